"""What a sweep measured: points by length and by position, and on what they were measured."""

from __future__ import annotations

from dataclasses import dataclass

from roformer_dist.extrapolation.intervals import Estimate

CROPPED = "cropped"
LABELS = {
    "none": "RoPE, unscaled",
    "linear": "linear (PI)",
    "ntk": "NTK-aware",
    "yarn": "YaRN",
    CROPPED: "cropped to trained length",
}
METHODS = tuple(name for name in LABELS if name != CROPPED)


@dataclass(frozen=True)
class LengthPoint:
    """Loss of the scored targets under ``method`` with a context of ``length`` tokens.

    Attributes:
        factor: the scaling factor, ``max(1, length / trained_seq_len)``; 1 for unscaled and cropped.
        nll: over all scored targets, in nats.
        minus_cropped: of the paired differences to the cropped model.
    """

    method: str
    length: int
    factor: float
    nll: Estimate
    minus_cropped: Estimate


@dataclass(frozen=True)
class PositionPoint:
    """Loss of the targets with ``first`` to ``last`` tokens before them in the longest window.

    The other attributes are those of ``LengthPoint``, at the longest length.
    """

    method: str
    first: int
    last: int
    factor: float
    nll: Estimate
    minus_cropped: Estimate


@dataclass(frozen=True)
class SweepResult:
    """What was measured and on what.

    Attributes:
        trained_seq_len: the context the model was trained at, in tokens.
        lengths: contexts, ascending.
        methods: in the order asked for, without the cropped baseline, which is always there.
        scored: targets of a window, ``trained_seq_len // 2``.
        windows, documents: how many windows were scored, from how many documents.
        too_short: held-out documents without room for the longest context.
        tokens: fed through the network.
    """

    trained_seq_len: int
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    scored: int
    windows: int
    documents: int
    too_short: int
    tokens: int
    by_length: tuple[LengthPoint, ...]
    by_position: tuple[PositionPoint, ...]

    @property
    def longest(self) -> int:
        """The longest context, in tokens."""
        return self.lengths[-1]

    @property
    def targets(self) -> int:
        """Scored targets, the same at every length."""
        return self.windows * self.scored

    @property
    def rows(self) -> tuple[str, ...]:
        """The methods and the baseline, as the report orders them."""
        return (CROPPED, *self.methods)

    def at(self, method: str, length: int) -> LengthPoint:
        """The point of one method (or ``cropped``) at one length."""
        return next(p for p in self.by_length if (p.method, p.length) == (method, length))

    def best(self, length: int) -> str | None:
        """The row with the lowest loss at ``length``; None where the lowest is shared."""
        low = min(self.at(row, length).nll.mean for row in self.rows)
        winners = [row for row in self.rows if self.at(row, length).nll.mean == low]
        return winners[0] if len(winners) == 1 else None


def findings(result: SweepResult) -> list[str]:
    """One sentence a method about the longest length: against cropping, with the interval."""
    sentences = []
    for method in result.methods:
        gap = result.at(method, result.longest).minus_cropped
        interval = f"95 % interval {gap.low:+.3f} to {gap.high:+.3f}"
        if gap.low != gap.low:
            verdict = f"differs from cropping by {gap.mean:+.3f} nats (one document: no interval)"
        elif gap.sign:
            word = "worse" if gap.sign > 0 else "better"
            verdict = f"is {abs(gap.mean):.3f} nats {word} than cropping ({interval})"
        else:
            verdict = f"cannot be told from cropping: {gap.mean:+.3f} nats ({interval})"
        sentences.append(f"At {result.longest:,} tokens {LABELS[method]} {verdict}.")
    return sentences
