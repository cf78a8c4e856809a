"""What all tests share: threads, seeds, and reproducible examples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# The shapes here are tiny: a second thread costs more than it brings, and sums keep one order.
torch.set_num_threads(1)

# The same examples in every run, so that a failure can be looked at again; no time limit for one example.
settings.register_profile("repository", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repository")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
