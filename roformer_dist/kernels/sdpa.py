"""PyTorch's CPU flash attention, by document.

The operator takes neither cu_seqlens nor offsets, and aligns causal masks top-left. Documents and
offsets are therefore calls on blocks, merged by lse in the forward and added up in the backward;
neighbouring documents of equal length share one call. There is never an N x N mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.blocks import Block, visible_blocks

# Four of the operator's blocks of queries, which are 64 long from here on.
MANY_QUERIES = 256


class SdpaKernel:
    """Flash attention on the CPU, forward and backward, with grouped-query heads."""

    name = "sdpa"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        q, k, v = _dense_heads(q, k, v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
        for run in _runs(mask):
            q_run, k_run, v_run = run.queries(q), run.keys(k), run.keys(v)
            out_run, lse_run = run.queries(out), run.lse(lse)
            if run.is_one_block:
                out_block, lse_block = _flash(q_run, k_run, v_run, run.blocks[0], softmax_scale)
                out_run.copy_(out_block)
                lse_run.copy_(lse_block)
                continue
            total = torch.zeros(q_run.shape, dtype=lse.dtype, device=q.device)
            lse_run.fill_(-torch.inf)
            for block in run.blocks:
                out_block, lse_block = _flash(q_run, k_run, v_run, block, softmax_scale)
                rows = slice(block.q_start, block.q_stop)
                _merge(total[:, :, rows], lse_run[:, :, rows], out_block, lse_block)
            out_run.copy_(total)
        return out, lse

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
        dout, q, k, v, out = _dense_heads(dout, q, k, v, out)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for run in _runs(mask):
            saved = (
                run.queries(dout),
                run.queries(q),
                run.keys(k),
                run.keys(v),
                run.queries(out),
                run.lse(lse),
            )
            targets = (run.queries(dq), run.keys(dk), run.keys(dv))
            if run.is_one_block:
                sums = _flash_backward(*saved, run.blocks[0], softmax_scale)
            else:
                sums = tuple(torch.zeros(t.shape, dtype=lse.dtype, device=q.device) for t in targets)
                for block in run.blocks:
                    rows, columns = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
                    parts = _flash_backward(*saved, block, softmax_scale)
                    for total, part, where in zip(sums, parts, (rows, columns, columns)):
                        total[:, :, where] += part
            for target, total in zip(targets, sums):
                target.copy_(total)
        return dq, dk, dv


@dataclass(frozen=True)
class _Run:
    """Neighbouring documents of one shape, computed as a batch."""

    count: int
    q_start: int
    q_len: int
    k_start: int
    k_len: int
    blocks: list[Block]

    def queries(self, x: Tensor) -> Tensor:
        """The run's part of ``[tokens_q, N, D]`` as a view ``[count, N, q_len, D]``."""
        return _batched(x, self.q_start, self.count, self.q_len)

    def keys(self, x: Tensor) -> Tensor:
        """The run's part of ``[tokens_k, M, D]`` as a view ``[count, M, k_len, D]``."""
        return _batched(x, self.k_start, self.count, self.k_len)

    def lse(self, lse: Tensor) -> Tensor:
        """The run's part of ``[N, tokens_q]`` as a view ``[count, N, q_len]``."""
        part = lse[:, self.q_start : self.q_start + self.count * self.q_len]
        return part.unflatten(1, (self.count, self.q_len)).transpose(0, 1)

    @property
    def is_one_block(self) -> bool:
        """Whether a single call covers all queries and keys, so that nothing needs merging."""
        if len(self.blocks) != 1:
            return False
        block = self.blocks[0]
        return (block.q_start, block.q_stop, block.k_start, block.k_stop) == (0, self.q_len, 0, self.k_len)


def _dense_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    # The operator takes any strides but that of head_dim, which it reads as 1 without looking.
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _batched(x: Tensor, start: int, count: int, length: int) -> Tensor:
    return x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)


def _runs(mask: MaskSpec) -> Iterator[_Run]:
    documents = mask.documents
    index = 0
    while index < len(documents):
        q_start, q_len, k_start, k_len, offset = documents[index]
        count = 1
        while index + count < len(documents):
            _, next_q, _, next_k, next_offset = documents[index + count]
            if (next_q, next_k, next_offset) != (q_len, k_len, offset):
                break
            count += 1
        index += count
        if q_len or k_len:
            blocks = visible_blocks(
                q_len,
                k_len,
                offset,
                causal=mask.causal,
                window=mask.window,
                min_distance=mask.min_distance,
            )
            yield _Run(count, q_start, q_len, k_start, k_len, blocks)


def _oriented(block: Block, *tensors: Tensor) -> tuple[Tensor, ...]:
    # An upper triangle becomes a lower one when queries and keys are both read backwards.
    return tuple(x.flip(2) for x in tensors) if block.shape == "upper" else tensors


def _by_head(*tensors: Tensor) -> tuple[Tensor, ...]:
    # A head's tokens side by side, because the operator reads them once for each block of queries: 8 to 20 % less
    # time in bf16. The first of ``tensors`` has the queries' length; a few of them are not worth a copy of all keys.
    return tuple(x.contiguous() for x in tensors) if tensors[0].shape[2] >= MANY_QUERIES else tensors


def _flash(q: Tensor, k: Tensor, v: Tensor, block: Block, softmax_scale: float) -> tuple[Tensor, Tensor]:
    rows, columns = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
    q, k, v = _by_head(*_oriented(block, q[:, :, rows], k[:, :, columns], v[:, :, columns]))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, block.shape != "full", scale=softmax_scale
    )
    out, lse = _oriented(block, out, lse)
    return out, lse


def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: Block,
    softmax_scale: float,
) -> tuple[Tensor, ...]:
    rows, columns = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
    dout, q, out, lse = _oriented(block, *(x[:, :, rows] for x in (dout, q, out, lse)))
    k, v = _oriented(block, k[:, :, columns], v[:, :, columns])
    if q.element_size() == 2:  # in float32 the backward does not gain what the copies cost
        dout, q, k, v, out = _by_head(dout, q, k, v, out)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse.contiguous(), 0.0, block.shape != "full", scale=softmax_scale
    )
    return _oriented(block, *grads)


def _merge(total: Tensor, lse: Tensor, out_block: Tensor, lse_block: Tensor) -> None:
    """Fold a block's output into the running one, in place: weights are shares of the common normaliser."""
    merged = torch.logaddexp(lse, lse_block)
    total.mul_((lse - merged).exp()[..., None]).add_(out_block * (lse_block - merged).exp()[..., None])
    lse.copy_(merged)
