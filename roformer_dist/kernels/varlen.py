"""Flash attention over packed documents on CUDA: PyTorch's own, or the flash-attn package's. Both in bf16 or fp16.

Shapes: T queries, U keys, N query heads, M key/value heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.packed import PackedCall, packed_calls

MAX_HEAD_DIM = 256
# Masks whose calls are remembered: the kinds of layer of a model, forward and backward.
REMEMBERED = 8


@dataclass(frozen=True)
class Packing:
    """A call's documents on the device.

    Attributes:
        call: the band.
        cu_q, cu_k: int32 prefix sums; ``max_q``, ``max_k`` the longest.
        q_index, k_index: which tokens the call takes; None for all, in order.
    """

    call: PackedCall
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    q_index: Tensor | None
    k_index: Tensor | None


class PackedFlash(Protocol):
    """A flash kernel over packed documents. Its lse is ``[N, T]`` float32, ``+inf`` for a query without keys."""

    name: str

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float
    ) -> tuple[Tensor, Tensor]:
        """``(out [T, N, D], lse [N, T])``."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        packing: Packing,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)``, given the global ``out`` and ``lse``."""
        ...


class VarlenKernel:
    """Any mask on a packed flash kernel: documents, offsets, windows, grouped heads, any head_dim up to 256."""

    def __init__(self, flash: PackedFlash) -> None:
        self.name = flash.name
        self._flash = flash
        self._packings: list[tuple[MaskSpec, torch.device, list[Packing]]] = []

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        head_dim = q.shape[-1]
        q, k, v = (_padded(x) for x in (q, k, v))
        out: Tensor | None = None
        lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
        for packing in self._packings_of(mask, q, k):
            rows, columns = packing.q_index, packing.k_index
            part, part_lse = self._flash.forward(
                _take(q, rows), _take(k, columns), _take(v, columns), packing, softmax_scale
            )
            # A query without keys: its output is 0, its lse here -inf, as the merge of partial results wants it.
            part_lse = part_lse.masked_fill(part_lse == torch.inf, -torch.inf)
            if rows is None:
                out, lse = part, part_lse
            else:
                out = torch.zeros_like(q) if out is None else out
                out[rows], lse[:, rows] = part, part_lse
        out = torch.zeros_like(q) if out is None else out
        return out[..., :head_dim].contiguous(), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: MaskSpec,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel."""
        head_dim = q.shape[-1]
        dout, q, k, v, out = (_padded(x) for x in (dout, q, k, v, out))
        # exp(score - inf) is 0; with -inf it would be NaN.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        grads: tuple[Tensor, ...] | None = None
        for packing in self._packings_of(mask, q, k):
            rows, columns = packing.q_index, packing.k_index
            parts = self._flash.backward(
                _take(dout, rows),
                _take(q, rows),
                _take(k, columns),
                _take(v, columns),
                _take(out, rows),
                (lse if rows is None else lse[:, rows]).contiguous(),
                packing,
                softmax_scale,
            )
            if rows is None:
                grads = parts
                continue
            grads = grads or _zeros_like(q, k, v)
            for grad, part, where in zip(grads, parts, (rows, columns, columns)):
                grad[where] = part
        dq, dk, dv = (grad[..., :head_dim] for grad in grads or _zeros_like(q, k, v))
        return dq, dk, dv

    def _packings_of(self, mask: MaskSpec, q: Tensor, k: Tensor) -> list[Packing]:
        # Every layer asks for the same mask, forward and backward; the answer costs copies to the device.
        for known, device, packings in self._packings:
            if known is mask and device == q.device:
                return packings
        packings = [_pack(call, len(q), len(k), q.device) for call in packed_calls(mask)]
        self._packings = [(mask, q.device, packings), *self._packings[: REMEMBERED - 1]]
        return packings


class TorchFlash:
    """``torch.nn.attention.varlen``'s kernel, by the operators beneath it: those take and give lse."""

    name = "varlen"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See PackedFlash."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(q, k, v, packing.cu_q, packing.cu_k, packing.max_q, packing.max_k),
            *(0.0, packing.call.causal, False),
            scale=scale,
            window_size_left=packing.call.left,
            window_size_right=packing.call.right,
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        packing: Packing,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See PackedFlash."""
        # The generator's state is for dropout, of which there is none.
        rng_state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *(dout, q, k, v, out, lse, packing.cu_q, packing.cu_k, packing.max_q, packing.max_k),
            *(0.0, packing.call.causal, rng_state, unused),
            scale=scale,
            window_size_left=packing.call.left,
            window_size_right=packing.call.right,
        )
        return dq, dk, dv


class FlashAttn2:
    """The flash-attn package, version 2.8, by the operators beneath ``flash_attn_varlen_func``."""

    name = "flash_attn"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See PackedFlash."""
        from flash_attn import flash_attn_interface  # pyright: ignore[reportMissingImports]

        out, lse, *_ = flash_attn_interface._wrapped_flash_attn_varlen_forward(
            *(q, k, v, packing.cu_q, packing.cu_k, packing.max_q, packing.max_k),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=packing.call.causal,
            window_size_left=packing.call.left,
            window_size_right=packing.call.right,
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        packing: Packing,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See PackedFlash."""
        from flash_attn import flash_attn_interface  # pyright: ignore[reportMissingImports]

        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        flash_attn_interface._wrapped_flash_attn_varlen_backward(
            *(dout, q, k, v, out, lse, *grads),
            *(packing.cu_q, packing.cu_k, packing.max_q, packing.max_k),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=packing.call.causal,
            window_size_left=packing.call.left,
            window_size_right=packing.call.right,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=False,
        )
        return grads


def _pack(call: PackedCall, tokens_q: int, tokens_k: int, device: torch.device) -> Packing:
    def prefix_sums(lengths: list[int]) -> Tensor:
        return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)

    def places(starts: list[int], lengths: list[int]) -> Tensor:
        runs = [torch.arange(start, start + n) for start, n in zip(starts, lengths)]
        return torch.cat(runs).to(device)

    q_lens, k_lens = call.lengths
    whole = call.covers(tokens_q, tokens_k)
    return Packing(
        call=call,
        cu_q=prefix_sums(q_lens),
        cu_k=prefix_sums(k_lens),
        max_q=max(q_lens),
        max_k=max(k_lens),
        q_index=None if whole else places([p.q_start for p in call.pieces], q_lens),
        k_index=None if whole else places([p.k_start for p in call.pieces], k_lens),
    )


def _zeros_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(x) for x in tensors)


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x[index]


def _padded(x: Tensor) -> Tensor:
    # Kernels want multiples of 8; zeros change no score.
    return F.pad(x, (0, -x.shape[-1] % 8)).contiguous()
