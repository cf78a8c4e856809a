"""The section that says how one model is spread over processes."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from roformer_dist.config.section import PositiveInt, Section


class ParallelConfig(Section):
    """How one model is spread over processes."""

    sp_size: PositiveInt = 1
    """Processes that share one sequence: ulysses_size x ring_size; default: their product, if they are given."""
    ulysses_size: PositiveInt | None = None
    """Processes that trade slices of the sequence for heads (all-to-all); default: sp_size / ring_size."""
    ring_size: PositiveInt = 1
    """Processes between which keys and values go round while queries stay; for what ulysses_size cannot spread."""
    head_chunks: PositiveInt = 1
    """Rounds in which a process's heads are sent and attended to: smaller buffers, more messages."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO: 0 shards nothing, 1 optimizer states, 2 gradients too, 3 parameters too."""
    preflight: bool = True
    """With sp_size > 1, first compare a small copy of the run on its own ranks with one process (docs/parity.md)."""

    @property
    def ulysses(self) -> int:
        """``ulysses_size``, or what sp_size leaves for it."""
        return self.ulysses_size or self.sp_size // self.ring_size

    @model_validator(mode="before")
    @classmethod
    def _fill_sp_size(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "sp_size" in values:
            return values
        sizes = [values.get("ulysses_size", 1), values.get("ring_size", 1)]
        # What is no positive integer is reported by its own field.
        if all(type(size) is int and size > 0 for size in sizes):
            return values | {"sp_size": sizes[0] * sizes[1]}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sp_size % self.ring_size:
            raise ValueError(
                f"ring_size = {self.ring_size} does not divide sp_size = {self.sp_size}; "
                f"sp_size is ulysses_size x ring_size"
            )
        if self.ulysses * self.ring_size != self.sp_size:
            raise ValueError(
                f"ulysses_size = {self.ulysses} x ring_size = {self.ring_size} is {self.ulysses * self.ring_size}, "
                f"not sp_size = {self.sp_size}; change one of them or leave sp_size out"
            )
        if self.head_chunks > 1 and self.sp_size == 1:
            raise ValueError(
                f"head_chunks = {self.head_chunks} is for sequences that several processes share; "
                "with sp_size = 1 set it to 1"
            )
        return self
