"""How tokens know where they are, besides rotation: what the paper compares with.

Learned and sinusoidal positions are added to the embedding; T5's relative bias and ALiBi to the scores.
All of them go by ``position_ids``, which restart with each document.

Shapes: R rows, S tokens, T and U positions of a tile, N heads, C embedding_width, B buckets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from roformer_dist.config.layers import (
    AlibiPosition,
    LearnedPosition,
    RelativeBiasPosition,
    SinusoidalPosition,
)
from roformer_dist.config.model import ModelConfig
from roformer_dist.kernels.attention import ScoreBias


class LearnedPositions(nn.Module):
    """A vector for each position below ``max_seq_len``."""

    def __init__(self, max_seq_len: int, embedding_width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(max_seq_len, embedding_width)

    def forward(self, position_ids: Tensor) -> Tensor:
        """``[R, S, C]`` for whole ``position_ids`` ``[R, S]``.

        Raises:
            ValueError: a fraction; on a CPU also a position that has no vector. CUDA would have to wait for the
                positions to be looked at, and has an assertion of its own in the lookup.
        """
        last = self.table.num_embeddings - 1
        if position_ids.is_floating_point():
            raise ValueError("model.position.kind = 'learned' has no vectors for fractional positions")
        on_cpu = position_ids.device.type == "cpu"
        if on_cpu and position_ids.numel() and (highest := int(position_ids.max())) > last:
            raise ValueError(
                f"position {highest} has no learned vector: model.position.max_seq_len = {last + 1} ends at {last}"
            )
        return self.table(position_ids)


class SinusoidalPositions(nn.Module):
    """Sine and cosine of each frequency (arXiv 1706.03762, section 3.5), times ``scale``.

    In that paper embeddings enter with a standard deviation of 1; ``scale`` is ours, so that position and
    token keep their proportion.
    """

    def __init__(self, embedding_width: int, scale: float) -> None:
        super().__init__()
        self.embedding_width = embedding_width
        self.scale = scale

    def forward(self, position_ids: Tensor) -> Tensor:
        """float32 ``[R, S, C]`` for ``position_ids`` ``[R, S]``, whole or not; angles are float64."""
        exponents = torch.arange(0, self.embedding_width, 2, dtype=torch.float64, device=position_ids.device)
        frequencies = 10000.0 ** -(exponents / self.embedding_width)
        angles = position_ids.to(torch.float64)[..., None] * frequencies
        return (torch.stack([angles.sin(), angles.cos()], -1).flatten(-2) * self.scale).to(torch.float32)


class RelativeBias(nn.Module):
    """T5's bias (arXiv 1910.10683): distances in buckets, exact when small, logarithmic when large."""

    def __init__(self, position: RelativeBiasPosition, num_heads: int) -> None:
        super().__init__()
        self.max_distance = position.max_distance
        self.table = nn.Embedding(position.num_buckets, num_heads)

    def forward(self, q_positions: Tensor, k_positions: Tensor, *, causal: bool) -> ScoreBias:
        """The bias of queries and keys at these positions; if causal, all buckets are for keys before the query."""
        buckets, max_distance = self.table.num_embeddings, self.max_distance
        # Looked up, not the weight itself: ZeRO-3 takes the weight away after this forward.
        values = self.table(torch.arange(buckets, device=q_positions.device)).T

        def function(values: Tensor, distance: Tensor) -> Tensor:
            bucket = relative_buckets(distance, buckets, max_distance, causal=causal)
            return values.index_select(1, bucket.flatten()).unflatten(1, bucket.shape)

        return ScoreBias(values, function, q_positions, k_positions)


def relative_buckets(distance: Tensor, num_buckets: int, max_distance: int, *, causal: bool) -> Tensor:
    """T5's bucket of each ``distance`` (query position minus key position), int64.

    Both ways, the upper half of the buckets is for keys after the query; causal, those fall into bucket 0.
    """
    if not causal:
        num_buckets //= 2
    far = distance.clamp(min=0) if causal else distance.abs()
    exact = num_buckets // 2
    # float32 as in T5's code: a bucket's edge is where its rounding puts it.
    octaves = torch.log(far.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (octaves * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    bucket = torch.where(far < exact, far.long(), logarithmic)
    return bucket if causal else bucket + num_buckets * (distance < 0)


def alibi_slopes(num_heads: int) -> Tensor:
    """ALiBi's slopes, float32 ``[N]``: ``2 ** (-8 i / N)``, i = 1..N, where N is a power of two.

    Other numbers of heads take those of the next lower power and every other one of twice that many.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-4 * i / power) for i in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


def alibi_bias(q_positions: Tensor, k_positions: Tensor, num_heads: int) -> ScoreBias:
    """ALiBi for queries and keys at these positions: minus slope times distance, to either side."""
    slopes = alibi_slopes(num_heads).to(q_positions.device)
    return ScoreBias(slopes, _sloped, q_positions, k_positions)


def _sloped(slopes: Tensor, distance: Tensor) -> Tensor:
    return -slopes[:, None, None] * distance.abs()


class Positions(nn.Module):
    """The configured alternative to rotation, with its parameters if it has some."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.num_heads = model.num_heads
        self.alibi = isinstance(model.position, AlibiPosition)
        self.added: nn.Module | None = None
        self.relative_bias: RelativeBias | None = None
        match model.position:
            case LearnedPosition(max_seq_len=max_seq_len):
                self.added = LearnedPositions(max_seq_len, model.embedding_width)
            case SinusoidalPosition():
                self.added = SinusoidalPositions(model.embedding_width, model.init_std)
            case RelativeBiasPosition() as position:
                self.relative_bias = RelativeBias(position, model.num_heads)

    def add_to(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """The embedding ``[R, S, C]`` with what belongs to its positions."""
        return x if self.added is None else x + self.added(position_ids).to(x.dtype)

    def score_bias(self, q_positions: Tensor, k_positions: Tensor, *, causal: bool) -> ScoreBias | None:
        """What is added to the scores of every layer that knows positions, ``[R, S]`` and ``[R, U]``."""
        if self.alibi:
            return alibi_bias(q_positions, k_positions, self.num_heads)
        if self.relative_bias is None:
            return None
        return self.relative_bias(q_positions, k_positions, causal=causal)
