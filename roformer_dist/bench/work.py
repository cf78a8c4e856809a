"""The tokens of a step and what to predict, the same for every contender."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roformer_dist.batch import IGNORE_INDEX
from roformer_dist.bench.train import Job


@dataclass(frozen=True)
class Work:
    """One row.

    Attributes:
        input_ids: int64 ``[1, S]``.
        labels: int64 ``[1, S]``, the target of the token at the same place (already shifted when causal).
        position_ids: int64 ``[1, S]``, from 0 in every document.
        documents: their lengths, S in total.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    documents: tuple[int, ...]

    @property
    def targets(self) -> int:
        """How many labels count."""
        return int((self.labels != IGNORE_INDEX).sum())


def draw_work(job: Job) -> Work:
    """Random tokens; the next token of the document as target, or the tokens at random places."""
    generator = torch.Generator().manual_seed(job.seed)
    input_ids = torch.randint(job.shape.vocab_size, (1, job.length), generator=generator)
    position_ids = torch.cat([torch.arange(length) for length in job.documents])[None]
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    if job.workload == "masked":
        chosen = torch.rand(input_ids.shape, generator=generator) < job.mask_probability
        chosen[0, 0] = True  # a very short row would have no target
        labels[chosen] = torch.randint(job.shape.vocab_size, (int(chosen.sum()),), generator=generator)
    else:
        labels[:, :-1] = input_ids[:, 1:]
        # The first token of a document is nobody's target.
        labels[:, :-1][position_ids[:, 1:] == 0] = IGNORE_INDEX
    return Work(input_ids, labels, position_ids, job.documents)
