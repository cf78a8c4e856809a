"""Batch and MaskSpec: what a model is fed and which keys a query may see.

Shapes: R rows, S sequence, D documents (contiguous runs of tokens over the flattened R*S axis).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100


def visible_distances(
    *, causal: bool, window: int | None, min_distance: int | None
) -> tuple[int | None, int | None]:
    """The bounds of ``MaskSpec.distances`` from the words of a mask."""
    farthest = None if window is None else window - 1
    lowest = [0] if causal else [] if farthest is None else [-farthest]
    lowest += [] if min_distance is None else [min_distance]
    return max(lowest, default=None), farthest


@dataclass(frozen=True)
class MaskSpec:
    """Which keys each query sees, as documents over the flattened token axis.

    Document ``i`` holds queries ``cu_seqlens_q[i]:cu_seqlens_q[i+1]`` and keys
    ``cu_seqlens_k[i]:cu_seqlens_k[i+1]``. A query sees keys of its own document only. With
    ``causal``, query ``a`` of document ``i`` sees key ``b`` when
    ``k_offset[i] + b <= q_offset[i] + a``; with ``window`` w, additionally
    ``q_offset[i] + a - (k_offset[i] + b) < w`` (and, not causal, its mirror image). With
    ``min_distance`` m, it must also be at least m: the region behind a window.

    The offsets say where a query or key chunk starts inside its document, so that ring hops,
    zigzag halves and KV caches need no convention about how unequal lengths are aligned
    (PyTorch's CPU kernel aligns top-left, flash-attn bottom-right).

    Attributes:
        cu_seqlens_q, cu_seqlens_k: int32 ``[D + 1]`` prefix sums, from 0 to the token count.
        max_q, max_k: the longest document's number of queries and keys.
        causal: whether keys after the query are hidden.
        q_offset, k_offset: int32 ``[D]``, the position of each chunk's first token; ``None`` is 0.
        window: the number of positions a query sees, itself included; ``None`` is all.
        min_distance: how far behind its query the nearest visible key lies; ``None`` is no bound. Regions
            of one attention that are rotated differently are disjoint bands of distances.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    q_offset: Tensor | None = None
    k_offset: Tensor | None = None
    window: int | None = None
    min_distance: int | None = None

    @classmethod
    def from_lengths(cls, lengths: list[int], *, causal: bool, window: int | None = None) -> MaskSpec:
        """Self-attention inside documents of the given lengths."""
        # By numpy: a tensor made of a list costs as much as reading a row.
        cu_seqlens = torch.from_numpy(np.fromiter(accumulate(lengths, initial=0), np.int32, len(lengths) + 1))
        longest = max(lengths, default=0)
        return cls(cu_seqlens, cu_seqlens, longest, longest, causal, window=window)

    @cached_property
    def documents(self) -> tuple[tuple[int, int, int, int, int], ...]:
        """Per document ``(q_start, q_len, k_start, k_len, q_offset - k_offset)`` as integers."""
        starts_q, starts_k = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        count = len(starts_q) - 1
        offsets_q = self.q_offset.tolist() if self.q_offset is not None else [0] * count
        offsets_k = self.k_offset.tolist() if self.k_offset is not None else [0] * count
        return tuple(
            (
                starts_q[i],
                starts_q[i + 1] - starts_q[i],
                starts_k[i],
                starts_k[i + 1] - starts_k[i],
                offsets_q[i] - offsets_k[i],
            )
            for i in range(count)
        )

    @property
    def distances(self) -> tuple[int | None, int | None]:
        """The nearest and the farthest visible distance, query position minus key position; ``None``: no bound."""
        return visible_distances(causal=self.causal, window=self.window, min_distance=self.min_distance)

    def hidden(self, distance: Tensor) -> Tensor:
        """Whether a key at ``distance`` (see ``distances``) is hidden from its query, elementwise."""
        nearest, farthest = self.distances
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if nearest is not None:
            hidden |= distance < nearest
        if farthest is not None:
            hidden |= distance > farthest
        return hidden

    def to(self, device: torch.device | str) -> MaskSpec:
        """The same mask with its tensors on ``device``."""
        move = lambda t: None if t is None else t.to(device)  # noqa: E731
        return replace(
            self,
            cu_seqlens_q=self.cu_seqlens_q.to(device),
            cu_seqlens_k=self.cu_seqlens_k.to(device),
            q_offset=move(self.q_offset),
            k_offset=move(self.k_offset),
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch, or one rank's slice of it.

    Attributes:
        input_ids: int64 ``[R, S]`` tokens.
        labels: int64 ``[R, S]``; ``labels[r, t]`` is already the target of ``input_ids[r, t]``, and
            ``IGNORE_INDEX`` where nothing counts. Shifted before any slicing.
        position_ids: int64 or float ``[R, S]`` position inside the document piece.
        counters: int64 ``[R, S]`` a number unique to each token slot of the run,
            ``slot * seq_len + index``; random draws per token are pure functions of it.
        mask: documents over the flattened token axis of the whole (unsliced) micro-batch.
        token_type_ids: int64 ``[R, S]`` rows of the token-type embedding; ``None`` is 0 everywhere.
        extent: the longest position of the whole micro-batch plus 1, where this is a slice of it; ``None``:
            of ``position_ids``.
        row_labels: int64 ``[R]`` the class of each row, ``IGNORE_INDEX`` where it does not count; for
            classification, whose rows ``labels`` may ignore altogether.
        row_ids: int64 ``[R]`` a number unique to each row of the run, for draws per row.
        pool_weights: float32 ``[R, S]`` how the features of a row add up to the one that is classified.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    counters: Tensor
    mask: MaskSpec
    token_type_ids: Tensor | None = None
    extent: float | None = None
    row_labels: Tensor | None = None
    row_ids: Tensor | None = None
    pool_weights: Tensor | None = None

    @property
    def num_valid(self) -> int:
        """The number of targets that count in this batch."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor | MaskSpec)}
        return replace(self, **moved)
