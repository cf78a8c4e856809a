"""Where DeepSpeed keeps a parameter's fp32 value and Adam moments, as ranges of the flattened parameter.

At every ZeRO stage a rank holds fp32 tensors that the wrapped torch optimizer steps ("owners"): the
parameters themselves, or flat partitions of many. A :class:`Slot` says which elements of which parameter lie
where in which owner; saving and loading are the same loop over slots at every stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from roformer_dist.engine.checkpoint_files import KINDS, CheckpointError, Fragment, Kind

MOMENTS = KINDS[1:]


@dataclass(frozen=True)
class Slot:
    """Elements ``[start, start + length)`` of a parameter, at ``offset`` of the flattened ``owner``."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    owner: Tensor
    offset: int
    training_dtype: str


class RangeReader(Protocol):
    """What :func:`load_engine` needs of a checkpoint."""

    @property
    def path(self) -> Path: ...

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]: ...

    @property
    def optimizer_step(self) -> int: ...

    def read(self, name: str, kind: Kind, start: int, stop: int) -> Tensor: ...


def engine_fragments(engine: Any) -> Iterator[Fragment]:
    """This rank's share of the fp32 parameters and Adam moments; all ranks' shares cover each exactly once.

    The tensors are live views: copy each before asking for the next one, whose values may be read from NVMe into the
    same memory. No communication, no gathering.

    Raises:
        CheckpointError: the engine keeps its state where this module does not look (see :func:`_check`).
    """
    for slots in _by_owner(_shares(engine)):
        with _in_memory(engine, slots[0].owner, changed=False):
            for slot in slots:
                for kind in KINDS:
                    values = _values(engine, slot, kind)
                    yield Fragment(slot.name, kind, slot.shape, slot.start, values, slot.training_dtype)


def optimizer_step(engine: Any) -> int:
    """How many steps Adam has taken, for its bias correction; the same for every parameter.

    Raises:
        CheckpointError: parameters have taken different numbers of steps.
    """
    states = [_torch_optimizer(engine).state.get(slot.owner) for slot in _slots(engine)]
    steps = {int(state["step"]) if state else 0 for state in states} or {0}
    if len(steps) > 1:
        raise CheckpointError(
            f"parameters have taken {sorted(steps)} optimizer steps; every parameter must get a gradient "
            "on every step: remove the unused ones from the model"
        )
    return steps.pop()


def load_engine(engine: Any, reader: RangeReader) -> None:
    """Put a checkpoint's values, moments and step into the engine, then refresh the model's own copies.

    Every rank calls it (the refresh gathers low-precision parameters). Only the ranges this rank holds are
    read. Learning rate, weight decay and the like stay as the engine's configuration set them.

    Raises:
        CheckpointError: the checkpoint is of another model: a name or a shape differs.
    """
    slots = list(_slots(engine))
    _check_same_model(_named_shapes(engine), reader)
    for owned in _by_owner(slots):
        with _in_memory(engine, owned[0].owner, changed=True):
            for slot in owned:
                _read_into(engine, slot, KINDS, reader)
            # In place: torch's Adam counts in this tensor, and one shared by two owners would count twice.
            _state(engine, owned[0].owner)["step"].fill_(reader.optimizer_step)
    _refresh_model(engine)


def load_parameters_into(engine: Any, reader: RangeReader) -> None:
    """Put a checkpoint's parameters alone into the engine; the optimizer starts anew. Every rank calls it.

    Raises:
        CheckpointError: the checkpoint is of another model: a name or a shape differs.
    """
    slots = list(_slots(engine))
    _check_same_model(_named_shapes(engine), reader)
    for owned in _by_owner(slots):
        with _in_memory(engine, owned[0].owner, changed=True):
            for slot in owned:
                _read_into(engine, slot, KINDS[:1], reader)
    _refresh_model(engine)


def _read_into(engine: Any, slot: Slot, kinds: Sequence[Kind], reader: RangeReader) -> None:
    for kind in kinds:
        values = reader.read(slot.name, kind, slot.start, slot.start + slot.length)
        _values(engine, slot, kind).copy_(values)


def _check_same_model(model: dict[str, tuple[int, ...]], reader: RangeReader) -> None:
    saved = reader.parameters
    for name in [*model, *saved]:
        if name not in saved or name not in model:
            where = "model" if name in model else "checkpoint"
            raise CheckpointError(
                f"{reader.path}: parameter {name} is only in the {where} ({len(model)} parameters in the model, "
                f"{len(saved)} in the checkpoint): use the configuration that the checkpoint was trained with"
            )
        if model[name] != saved[name]:
            raise CheckpointError(
                f"{reader.path}: parameter {name} has shape {model[name]} in the model and {saved[name]} in the "
                "checkpoint: use the configuration that the checkpoint was trained with"
            )


def _named_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    return {name: _shape(parameter) for name, parameter in _network(engine).named_parameters()}


def _network(engine: Any) -> nn.Module:
    """The network itself; what wraps it for training (its loss) has no parameters and no say in names."""
    return getattr(engine.module, "network", engine.module)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    # Under ZeRO-3 the parameter itself is an empty tensor outside of its module's forward.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _torch_optimizer(engine: Any) -> Any:
    """The optimizer that DeepSpeed's wraps, or at fp32 stage 0 the client's own."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _values(engine: Any, slot: Slot, kind: Kind) -> Tensor:
    """The live fp32 elements of ``slot``, or those of one of its moments."""
    whole = slot.owner if kind == "parameter" else _state(engine, slot.owner)[kind]
    return whole.detach().view(-1).narrow(0, slot.offset, slot.length)


def _state(engine: Any, owner: Tensor) -> dict[str, Any]:
    """The optimizer's state for ``owner``, made as Adam would on its first step if there is none yet."""
    optimizer = _torch_optimizer(engine)
    state = optimizer.state[owner]
    if not state:
        in_kernel = any(optimizer.defaults.get(key) for key in ("fused", "capturable"))
        state["step"] = torch.zeros((), device=owner.device if in_kernel else "cpu")
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(owner, requires_grad=False)
    return state


def _by_owner(slots: Iterable[Slot]) -> Iterator[list[Slot]]:
    """Neighbouring slots of one owner together."""
    for _, owned in groupby(slots, key=lambda slot: id(slot.owner)):
        yield list(owned)


@contextmanager
def _in_memory(engine: Any, owner: Tensor, *, changed: bool) -> Iterator[None]:
    """Inside, ``owner`` and its moments are in memory, also where they are on NVMe between steps.

    Args:
        changed: write them back to NVMe; without it they are dropped, which is right for what was only read.
    """
    optimizer = engine.optimizer
    owners = optimizer.fp32_partitioned_groups_flat if getattr(optimizer, "swap_optimizer", False) else []
    index = next((index for index, held in enumerate(owners) if held is owner), None)
    # A share below one aligned read stays in memory: DeepSpeed does not swap it.
    if index is None or not optimizer._swappable_optimizer_subgroup(index):
        yield
        return
    # Moments that are made inside have no file yet to be read from again.
    unwritten = not _torch_optimizer(engine).state.get(owner)
    optimizer._optimizer_states_and_gradient_swap_in(index)
    try:
        yield
    finally:
        if changed or unwritten:
            optimizer._optimizer_states_and_gradient_swap_out(index)
        else:
            optimizer._release_swap_buffers(index)


def _shares(engine: Any) -> Iterator[Slot]:
    """The slots this rank writes: those it holds, except that replicas are split over the ranks."""
    if engine.zero_optimization_stage() > 0:
        yield from _slots(engine)
        return
    rank, world_size = engine.global_rank, engine.world_size
    for slot in _slots(engine):
        first, last = (slot.length * share // world_size for share in (rank, rank + 1))
        if first < last:
            yield replace(slot, start=first, offset=first, length=last - first)


def _slots(engine: Any) -> Iterator[Slot]:
    """Every range of every parameter whose fp32 value this rank holds."""
    _check(engine)
    names = {parameter: name for name, parameter in _network(engine).named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 3:
        ranges = _partitions_of_stage_3(engine.optimizer, names)
    elif stage > 0:
        ranges = _partitions_of_stages_1_and_2(engine.optimizer, names)
    else:
        ranges = _replicas_of_stage_0(names)
    for parameter, start, length, owner, offset in ranges:
        dtype = str(parameter.dtype).removeprefix("torch.")
        yield Slot(names[parameter], _shape(parameter), start, length, owner, offset, dtype)


Range = tuple[nn.Parameter, int, int, Tensor, int]  # parameter, start, length, owner, offset in owner


def _replicas_of_stage_0(names: dict[nn.Parameter, str]) -> Iterator[Range]:
    """Every rank holds, and the client's optimizer steps, the fp32 parameters themselves."""
    for parameter in names:
        yield parameter, 0, parameter.numel(), parameter, 0


def _partitions_of_stages_1_and_2(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[Range]:
    """A parameter's range lies in its group's flat fp32 partition; DeepSpeed's mapping has both addresses."""
    for parameter in names:
        mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
        if mapping is not None:  # None: all of it is on other ranks
            held, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            (owner,) = optimizer.param_groups[mapping.param_group_index]["params"]
            yield parameter, held.start, held.numel, owner, flat.start


def _partitions_of_stage_3(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[Range]:
    """Each rank holds an equal slice of every parameter, the last ones padded; the padding is cut off."""
    for index, group in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in group:
            assert parameter in names
            size = parameter.partition_numel()
            start = size * optimizer._get_param_partition_rank(parameter)
            length = min(size, parameter.ds_numel - start)
            if length > 0:
                yield parameter, start, length, optimizer.fp32_partitioned_groups_flat[index], offset
            offset += size


def _check(engine: Any) -> None:
    """Refuse what would be saved incompletely or wrongly.

    Raises:
        CheckpointError: naming the DeepSpeed setting or the parameter, and what to change.
    """
    optimizer = engine.optimizer
    if not isinstance(_torch_optimizer(engine), torch.optim.Adam):
        raise CheckpointError(
            f"optimizer {type(_torch_optimizer(engine)).__name__}: its state is not known here; "
            "use torch.optim.AdamW"
        )
    if engine.zero_optimization_stage() == 0 and engine.bfloat16_enabled():
        raise CheckpointError(
            "zero_stage=0 with bf16: DeepSpeed takes one optimizer step with no gradient before the first, "
            "so its state is not that of the other stages: use zero_stage=1"
        )
    for name, parameter in _network(engine).named_parameters():
        if not parameter.requires_grad:
            raise CheckpointError(f"parameter {name} is frozen; checkpoints hold trained parameters only")
    if getattr(optimizer, "round_robin_gradients", False):
        raise CheckpointError(
            "zero_optimization.round_robin_gradients=true: DeepSpeed's own map of parameters to partitions "
            "is wrong with it: set it to false"
        )
    if getattr(optimizer, "partial_offload", 1.0) < 1.0:
        raise CheckpointError(
            "zero_optimization.offload_optimizer with ratio < 1 keeps moments outside of the optimizer: "
            "offload all of it"
        )


@torch.no_grad()
def _refresh_model(engine: Any) -> None:
    """Recompute what the model computes with from the fp32 values, as DeepSpeed does after a step."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer._partition_all_parameters()
        for index, owner in enumerate(optimizer.fp32_partitioned_groups_flat):
            with _in_memory(engine, owner, changed=False):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer._post_step(timer_names=set())  # gathers the parameters kept whole on every rank
    elif engine.zero_optimization_stage() > 0:
        optimizer.update_lp_params()
