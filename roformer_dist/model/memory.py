"""What a block keeps for its backward: everything, its input alone, or its input and what attention gave."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.attention import ScoreBias, ScorePart, SequenceOps

Checkpointing = Literal["none", "full", "selective"]


@dataclass(frozen=True)
class ActivationMemory:
    """How a trunk runs its blocks.

    Attributes:
        checkpointing: ``full`` keeps a block's input and runs the block again in the backward. ``selective`` also
            keeps what attention gave (output, lse, and what other ranks sent), so that running the block again
            repeats neither attention nor communication.
        offload: what is kept waits in host memory, pinned on CUDA.
    """

    checkpointing: Checkpointing = "none"
    offload: bool = False

    def run(self, block: nn.Module, x: Tensor, ops: SequenceOps, *others: Any) -> Tensor:
        """``block(x, *others, ops)``."""
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return block(x, *others, ops)
        contexts: Any = {}
        if self.checkpointing == "selective":
            ops = kept = KeptAttention(ops, offload=self.offload)
            contexts = {"context_fn": lambda: (contextlib.nullcontext(), kept.repeating())}
        with save_on_cpu(pin_memory=x.is_cuda) if self.offload else contextlib.nullcontext():
            # Dropout is a function of the token, so there is no generator whose state would have to return.
            return checkpoint(
                block, x, *others, ops, use_reentrant=False, preserve_rng_state=False, **contexts
            )


class KeptAttention:
    """SequenceOps that computes each call once, for one block run twice.

    The first run's attention stays in the graph with what it saved, but without its inputs: those come from the
    second run, which calls nothing and takes the kept output.
    """

    def __init__(self, ops: SequenceOps, *, offload: bool) -> None:
        self.ops = ops
        self._offload = offload
        self._calls: list[_Call] = []
        self._repeating: Iterator[_Call] | None = None

    @property
    def share(self) -> float:
        """See SequenceOps."""
        return self.ops.share

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float) -> Tensor:
        """See SequenceOps."""
        return self._once((q, k, v), lambda: self.ops.attend(q, k, v, mask, softmax_scale))

    def attend_parts(self, parts: Sequence[ScorePart], v: Tensor, softmax_scale: float) -> Tensor:
        """See SequenceOps."""
        inputs = [v, *(x for part in parts for x in (part.q, part.k))]
        return self._once(inputs, lambda: self.ops.attend_parts(parts, v, softmax_scale))

    def attend_biased(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float, bias: ScoreBias
    ) -> Tensor:
        """See SequenceOps."""
        return self._once((q, k, v), lambda: self.ops.attend_biased(q, k, v, mask, softmax_scale, bias))

    def linear_attend(
        self, q_rotated: Tensor, k_rotated: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec
    ) -> Tensor:
        """See SequenceOps."""
        inputs = (q_rotated, k_rotated, q, k, v)
        return self._once(inputs, lambda: self.ops.linear_attend(*inputs, mask))

    def pool(self, x: Tensor, weights: Tensor) -> Tensor:
        """See SequenceOps; no block pools."""
        return self.ops.pool(x, weights)

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        """While the block runs again."""
        self._repeating = iter(self._calls)
        try:
            yield
        finally:
            self._repeating = None

    def _once(self, inputs: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        if self._repeating is not None:
            return next(self._repeating).repeat(inputs)
        call = _Call(_storages(inputs), self._offload)
        with saved_tensors_hooks(call.pack, call.unpack):
            out = compute()
        call.out = call.keep(out)
        self._calls.append(call)
        return out


# A view of a kept storage: its key, and where in it the tensor lies.
_View = tuple[int, tuple[int, ...], tuple[int, ...], int]


@dataclass
class _Call:
    """One call of the first run; ``inputs`` are the addresses of its inputs' storages."""

    inputs: list[int]
    offload: bool
    kept: dict[int, tuple[Tensor, torch.device]] = field(default_factory=dict)
    repeated: Sequence[Tensor] = ()
    out: _View | None = None

    def pack(self, tensor: Tensor) -> _View:
        """For the graph: which input or kept storage a saved tensor is a view of."""
        address = tensor.untyped_storage().data_ptr()
        if address in self.inputs:
            # Keys of inputs are negative, those of kept storages are addresses.
            return _view(~self.inputs.index(address), tensor)
        return self.keep(tensor)

    def keep(self, tensor: Tensor) -> _View:
        """Keep the storage behind ``tensor``, once however many tensors look at it."""
        address = tensor.untyped_storage().data_ptr()
        if address not in self.kept:
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            whole = tensor.detach().as_strided((size,), (1,), 0)
            self.kept[address] = (_to_host(whole) if self.offload else whole, tensor.device)
        return _view(address, tensor)

    def unpack(self, view: _View) -> Tensor:
        """The tensor that ``pack`` was given, its inputs as the second run made them."""
        key, shape, stride, offset = view
        if key < 0:
            assert self.repeated, "the block has not run again before its attention's backward"
            return self.repeated[~key].as_strided(shape, stride, offset)
        whole, device = self.kept[key]
        return whole.to(device, non_blocking=True).as_strided(shape, stride, offset)

    def repeat(self, inputs: Sequence[Tensor]) -> Tensor:
        """The kept output, for the second run."""
        assert self.out is not None
        self.repeated = [x.detach() for x in inputs]
        return _Resume.apply(self.unpack(self.out), *inputs)


class _Resume(torch.autograd.Function):
    """A constant that looks computed from its inputs, so that what follows saves what it saved the first time."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise AssertionError("the graph of a repeated run is never differentiated")


def _view(key: int, tensor: Tensor) -> _View:
    return (key, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _storages(tensors: Sequence[Tensor]) -> list[int]:
    return [x.untyped_storage().data_ptr() for x in tensors]


def _to_host(x: Tensor) -> Tensor:
    host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
    return host.copy_(x, non_blocking=True)
