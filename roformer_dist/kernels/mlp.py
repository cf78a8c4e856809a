"""The two-layer MLP as one operation, which keeps what its backward needs and no more; in tiles of tokens, if asked.

Left to autograd, SwiGLU keeps its input, both projections, the activated gate and the product: four times the
inner width. Here the activated values are made again in the backward. With tiles nothing of the inner width is
kept, and the backward repeats the projections (DeepSpeed's TiledMLP and ALST, arXiv 2506.13996, trade alike).

Shapes: T tokens, C hidden_size, I intermediate_size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The backward works on so many tokens at a time: its temporaries, five of the inner width, stay small.
CHUNK_TOKENS = 2048


class MlpWeights(NamedTuple):
    """``gate`` is None for GELU; biases are None or ``[I]``, ``[I]`` and ``[C]``."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


def mlp(x: Tensor, weights: MlpWeights, tile_tokens: int | None = None) -> Tensor:
    """``down(silu(gate(x)) * up(x))`` (SwiGLU, arXiv 2002.05202), or ``down(gelu(up(x)))`` without a gate.

    Args:
        x: ``[..., C]``.
        weights: ``[I, C]``, ``[I, C]``, ``[C, I]`` and biases.
        tile_tokens: tokens at a time, so that no tensor of the inner width exists for more; None: all at once.
    """
    if torch.compiler.is_compiling():
        # The compiler chooses itself what to keep and what to make again.
        return _plain(x, weights)
    return _Mlp.apply(x, tile_tokens, *weights)


def _plain(x: Tensor, weights: MlpWeights) -> Tensor:
    gate, up = _projections(x, weights)
    hidden = F.gelu(up) if gate is None else F.silu(gate) * up
    return F.linear(hidden, weights.down, weights.down_bias)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tile_tokens: int | None, *parameters: Tensor | None) -> Tensor:
        weights = MlpWeights(*parameters)  # pyright: ignore[reportArgumentType]
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(len(rows), len(weights.down))
        inner: list[Tensor | None] = [None, None]
        for part, out_part in zip(*(t.split(tile_tokens or max(1, len(rows))) for t in (rows, out))):
            gate, up = _projections(part, weights)
            hidden = F.gelu(up) if gate is None else F.silu(gate).mul_(up)
            out_part.copy_(F.linear(hidden, weights.down, weights.down_bias))
            if tile_tokens is None:
                inner = [gate, up]
        ctx.save_for_backward(x, *inner, *parameters)
        ctx.tile_tokens = tile_tokens
        return out.view(*x.shape[:-1], len(weights.down))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, *parameters = ctx.saved_tensors
        weights = MlpWeights(*parameters)
        rows, grads = x.reshape(-1, x.shape[-1]), grad_outputs[0].reshape(-1, len(weights.down))
        dx = torch.empty_like(rows, memory_format=torch.contiguous_format)
        # Sums over chunks in float32: in bf16 each would be rounded on top of the others.
        work = torch.promote_types(x.dtype, torch.float32)
        sums = [None if p is None else torch.zeros_like(p, dtype=work) for p in parameters]
        step = ctx.tile_tokens or CHUNK_TOKENS
        for start in range(0, len(rows), step):
            at = slice(start, start + step)
            if up is None:
                inner = _projections(rows[at], weights)
            else:
                inner = (None if gate is None else gate[at], up[at])
            dx[at] = _backward_chunk(rows[at], *inner, grads[at], weights, MlpWeights(*sums))  # pyright: ignore[reportArgumentType]
        ended = (None if s is None else s.to(p.dtype) for s, p in zip(sums, parameters))
        return dx.view(x.shape), None, *ended


def _projections(x: Tensor, weights: MlpWeights) -> tuple[Tensor | None, Tensor]:
    gate = None if weights.gate is None else F.linear(x, weights.gate, weights.gate_bias)
    return gate, F.linear(x, weights.up, weights.up_bias)


def _backward_chunk(
    x: Tensor, gate: Tensor | None, up: Tensor, dout: Tensor, weights: MlpWeights, sums: MlpWeights
) -> Tensor:
    """The gradient of some tokens' input; those of the weights are added to ``sums``."""
    d_hidden = dout @ weights.down
    if gate is None or weights.gate is None:
        hidden = F.gelu(up)
        d_up = torch.ops.aten.gelu_backward(d_hidden, up)
        dx = d_up @ weights.up
    else:
        activated = F.silu(gate)
        hidden = activated * up
        d_up = activated.mul_(d_hidden)
        d_gate = torch.ops.aten.silu_backward(d_hidden.mul_(up), gate)
        _add(sums.gate, sums.gate_bias, d_gate, x)
        dx = (d_up @ weights.up).addmm_(d_gate, weights.gate)
    _add(sums.down, sums.down_bias, dout, hidden)
    _add(sums.up, sums.up_bias, d_up, x)
    return dx


def _add(weight: Tensor | None, bias: Tensor | None, d_out: Tensor, x: Tensor) -> None:
    assert weight is not None
    weight += d_out.T @ x
    if bias is not None:
        bias += d_out.sum(0, dtype=bias.dtype)
