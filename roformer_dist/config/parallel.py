"""The section that says how one model is spread over processes."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

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
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where this process's optimizer states are kept, to be stepped on the CPU; cpu: host memory; nvme: ZeRO 3 only."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """ZeRO 3: where this process's share of the parameters waits until a layer computes with it; cpu: host memory."""
    nvme_path: str | None = None
    """An existing directory on every node's own disk, for what is offloaded to nvme; swap files come and go in it."""
    hpz_partition_size: PositiveInt = 1
    """ZeRO 3: processes of one node that keep a second copy of all parameters, so that the backward gathers in it."""
    quantized_weights: bool = False
    """ZeRO 3 on CUDA: gather parameters in 8 bits (ZeRO++ qwZ); changes results a little."""
    quantized_gradients: bool = False
    """ZeRO 3 on several CUDA nodes: reduce gradients in 4 bits (ZeRO++ qgZ); changes results a little."""
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
        self._check_zero()
        return self

    def _check_nvme(self) -> None:
        places = {"offload_optimizer": self.offload_optimizer, "offload_parameters": self.offload_parameters}
        on_nvme = [name for name, place in places.items() if place == "nvme"]
        if self.offload_optimizer == "nvme" and self.zero_stage != 3:
            raise ValueError(
                'offload_optimizer = "nvme" is for zero_stage = 3, and DeepSpeed ignores the disk at zero_stage = '
                f'{self.zero_stage}; set zero_stage = 3 or offload_optimizer = "cpu"'
            )
        for name in on_nvme:
            if not self.nvme_path:
                raise ValueError(
                    f'{name} = "nvme" needs nvme_path, a directory on a local disk; set it, or {name} = "cpu"'
                )
        if self.nvme_path is not None and not on_nvme:
            raise ValueError(
                f'nvme_path = {_toml(self.nvme_path)} is read with offload_optimizer or offload_parameters = "nvme" '
                "alone; set one of them or leave nvme_path out"
            )
        if self.offload_parameters == "nvme" and self.hpz_partition_size > 1:
            raise ValueError(
                f'offload_parameters = "nvme" takes the parameters out of memory, and hpz_partition_size = '
                f"{self.hpz_partition_size} keeps a second copy there; set hpz_partition_size = 1 or "
                'offload_parameters = "cpu"'
            )

    def _check_zero(self) -> None:
        """ValueError where DeepSpeed would leave a switch unread at this stage, without a word."""
        self._check_nvme()
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(
                f"offload_optimizer = {_toml(self.offload_optimizer)} needs sharded optimizer states, and "
                'zero_stage = 0 has none; set zero_stage to 1, 2 or 3, or offload_optimizer = "none"'
            )
        if self.zero_stage == 3:
            return
        switches = {
            "offload_parameters": (self.offload_parameters, "none"),
            "hpz_partition_size": (self.hpz_partition_size, 1),
            "quantized_weights": (self.quantized_weights, False),
            "quantized_gradients": (self.quantized_gradients, False),
        }
        for name, (value, off) in switches.items():
            if value != off:
                raise ValueError(
                    f"{name} = {_toml(value)} is for sharded parameters, and zero_stage = {self.zero_stage} has them "
                    f"whole; set zero_stage = 3 or {name} = {_toml(off)}"
                )


def _toml(value: str | int) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f'"{value}"'
        if isinstance(value, str)
        else str(value)
    )
