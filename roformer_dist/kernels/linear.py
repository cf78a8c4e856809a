"""Linear attention with rotation in the numerator only (RoFormer, eq. 19), by states of constant size.

    out_m = sum_n (R_m q_m . R_n k_n) v_n / sum_n q_m . k_n        q and k are feature maps, positive

What a query needs of any set of keys is one ``LinearState``, and states of disjoint keys add up; so do
their gradients, with queries in the place of keys. Recurrent, chunked and quadratic forms are the same
sums, and processes that share a sequence need to pass states only. Everything is summed in float32.

Shapes: L tokens of (a piece of) one document, N query heads, M key/value heads, G = N / M, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Tokens whose scores among themselves are computed at once in the causal form.
CHUNK = 128


class Streams(NamedTuple):
    """What linear attention reads, or the gradients of it: q's ``[L, N, D]``, k's and v ``[L, M, D]``."""

    q_rotated: Tensor
    k_rotated: Tensor
    q: Tensor
    k: Tensor
    v: Tensor

    def cut(self, tokens: slice) -> Streams:
        """The streams of some of the tokens."""
        return Streams(*(x[tokens] for x in self))

    def grouped(self) -> Streams:
        """In at least float32, q's as ``[L, M, G, D]``."""
        work = torch.promote_types(self.q.dtype, torch.float32)
        q_rotated, k_rotated, q, k, v = (x.to(work) for x in self)
        kv_heads = self.k.shape[1]
        q_rotated, q = (x.unflatten(1, (kv_heads, -1)) for x in (q_rotated, q))
        return Streams(q_rotated, k_rotated, q, k, v)


@dataclass(frozen=True)
class LinearState:
    """A set of keys as queries see it, or the gradient of that: float32.

    Attributes:
        kv: ``[M, D, D]``, the sum of rotated k times v.
        k: ``[M, D]``, the sum of unrotated k.
    """

    kv: Tensor
    k: Tensor

    def __add__(self, other: LinearState) -> LinearState:
        """The state of both sets, which must be disjoint."""
        return LinearState(self.kv + other.kv, self.k + other.k)


def empty_state(streams: Streams) -> LinearState:
    """The state of no keys."""
    work = torch.promote_types(streams.q.dtype, torch.float32)
    _, heads, width = streams.k.shape
    return LinearState(
        streams.k.new_zeros(heads, width, streams.v.shape[2], dtype=work),
        streams.k.new_zeros(heads, width, dtype=work),
    )


def key_state(streams: Streams) -> LinearState:
    """The state of these keys."""
    x = streams.grouped()
    return LinearState(torch.einsum("umd,ume->mde", x.k_rotated, x.v), x.k.sum(0))


def query_state(streams: Streams, d_numerator: Tensor, d_denominator: Tensor) -> LinearState:
    """The gradient of any state that all of these queries read; see ``document_backward``."""
    x = streams.grouped()
    d_numerator, d_denominator = _by_group(x, d_numerator, d_denominator)
    return LinearState(
        torch.einsum("tmgd,tmge->mde", x.q_rotated, d_numerator),
        torch.einsum("tmgd,tmg->md", x.q, d_denominator),
    )


def document_forward(streams: Streams, before: LinearState, *, causal: bool) -> tuple[Tensor, Tensor]:
    """``(numerator [L, N, D], denominator [L, N])`` in float32.

    ``before`` is the state of the document's other keys that these queries see: earlier ones if causal.
    """
    numerators, denominators = [], []
    state = before if causal else before + key_state(streams)
    for tokens in _chunks(streams):
        part = streams.cut(tokens)
        x = part.grouped()
        numerator = torch.einsum("tmgd,mde->tmge", x.q_rotated, state.kv)
        seen = state.k.expand_as(x.k)
        if causal:
            numerator += torch.einsum("mgtu,ume->tmge", _among_themselves(x.q_rotated, x.k_rotated), x.v)
            seen = seen + x.k.cumsum(0)
            state = state + key_state(part)
        numerators.append(numerator.flatten(1, 2))
        denominators.append(torch.einsum("tmgd,tmd->tmg", x.q, seen).flatten(1, 2))
    return torch.cat(numerators), torch.cat(denominators)


def document_backward(
    streams: Streams,
    d_numerator: Tensor,
    d_denominator: Tensor,
    before: LinearState,
    after: LinearState,
    *,
    causal: bool,
) -> Streams:
    """Gradients of ``streams``, in their dtypes.

    Args:
        streams: as in the forward.
        d_numerator, d_denominator: ``[L, N, D]`` and ``[L, N]``.
        before: as in the forward.
        after: ``query_state`` of the document's other queries that see these keys: later ones if causal.
    """
    grads = Streams(*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in streams))
    seen_by = after if causal else after + query_state(streams, d_numerator, d_denominator)
    state = before if causal else before + key_state(streams)
    for tokens in _chunks(streams):
        part = streams.cut(tokens)
        x = part.grouped()
        d_num, d_den = _by_group(x, d_numerator[tokens], d_denominator[tokens])
        dq_rotated = torch.einsum("tmge,mde->tmgd", d_num, state.kv)
        seen = state.k.expand_as(x.k)
        if causal:
            dq_rotated += torch.einsum("mgtu,umd->tmgd", _among_themselves(d_num, x.v), x.k_rotated)
            seen = seen + x.k.cumsum(0)
            state = state + key_state(part)
        grads.q_rotated[tokens] = dq_rotated.flatten(1, 2)
        grads.q[tokens] = (d_den[..., None] * seen[:, :, None]).flatten(1, 2)
    for tokens in reversed(_chunks(streams)):
        part = streams.cut(tokens)
        x = part.grouped()
        d_num, d_den = _by_group(x, d_numerator[tokens], d_denominator[tokens])
        dk_rotated = torch.einsum("ume,mde->umd", x.v, seen_by.kv)
        dv = torch.einsum("umd,mde->ume", x.k_rotated, seen_by.kv)
        dk = seen_by.k.expand_as(x.k)
        if causal:
            dk_rotated += torch.einsum("mgtu,tmgd->umd", _among_themselves(d_num, x.v), x.q_rotated)
            dv += torch.einsum("mgtu,tmge->ume", _among_themselves(x.q_rotated, x.k_rotated), d_num)
            dk = dk + torch.einsum("tmgd,tmg->tmd", x.q, d_den).flip(0).cumsum(0).flip(0)
            seen_by = seen_by + query_state(part, d_numerator[tokens], d_denominator[tokens])
        grads.k_rotated[tokens], grads.k[tokens], grads.v[tokens] = dk_rotated, dk, dv
    return grads


def sum_gradients(dout: Tensor, out: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of numerator and denominator from that of their quotient ``out``, float32."""
    d_numerator = dout.to(denominator.dtype) / denominator[..., None]
    return d_numerator, -(d_numerator * out).sum(-1)


def _chunks(streams: Streams) -> list[slice]:
    length = len(streams.q)
    return [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)] or [slice(0, 0)]


def _by_group(x: Streams, d_numerator: Tensor, d_denominator: Tensor) -> tuple[Tensor, Tensor]:
    kv_heads = x.k.shape[1]
    return d_numerator.unflatten(1, (kv_heads, -1)), d_denominator.unflatten(1, (kv_heads, -1))


def _among_themselves(q: Tensor, k: Tensor) -> Tensor:
    """Products ``[M, G, T, T]`` of a chunk's queries and the keys that are not after them."""
    return torch.einsum("tmgd,umd->mgtu", q, k).tril_()
