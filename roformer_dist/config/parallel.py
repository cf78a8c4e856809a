"""The section that says how one model is spread over processes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from roformer_dist.config.section import PositiveInt, Section


class ParallelConfig(Section):
    """How one model is spread over processes."""

    sp_size: PositiveInt = 1
    """Processes that share one sequence (Ulysses: all-to-all between sequence and heads)."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO: 0 shards nothing, 1 optimizer states, 2 gradients too, 3 parameters too."""
