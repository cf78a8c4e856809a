"""The two figures of a sweep: by context length and by position, each next to its paired difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from roformer_dist.extrapolation.result import (
    CROPPED,
    LABELS,
    LengthPoint,
    PositionPoint,
    SweepResult,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by the colour-blind; markers and dashes tell it in grey as well.
_STYLES = {
    CROPPED: {"color": "#000000", "linestyle": "--", "marker": "", "zorder": 2.5},
    "none": {"color": "#D55E00", "linestyle": "-", "marker": "o"},
    "linear": {"color": "#0072B2", "linestyle": "-", "marker": "s"},
    "ntk": {"color": "#009E73", "linestyle": "-", "marker": "^"},
    "yarn": {"color": "#CC79A7", "linestyle": "-", "marker": "D"},
}
# A curve more than this far above the cropped model (a perplexity 2.7 times as high) leaves the
# picture, with its value at the edge, instead of flattening all others.
_NATS_SHOWN = 1.0

_Point = LengthPoint | PositionPoint


def by_length_figure(result: SweepResult) -> Figure:
    """Perplexity of the same targets against the context length."""
    figure, left, right = _panels(result, "Same targets, growing context")
    for row in result.rows:
        points = [point for point in result.by_length if point.method == row]
        _curves(left, right, row, [point.length for point in points], points)
    for axes in (left, right):
        _length_axis(axes, result, sorted({*result.lengths, result.trained_seq_len}))
        axes.set_xlabel("context length (tokens)")
    _finish(left, right, result.by_length)
    return figure


def by_position_figure(result: SweepResult) -> Figure:
    """Perplexity against the number of tokens before the target, in windows of the longest length."""
    figure, left, right = _panels(result, f"Inside one window of {result.longest:,} tokens")
    for row in result.rows:
        points = [point for point in result.by_position if point.method == row]
        # A bucket is drawn at its geometric middle, which is its middle on a logarithmic axis.
        middles = [(point.first * point.last) ** 0.5 for point in points]
        _curves(left, right, row, middles, points)
    ticks = [result.trained_seq_len]
    while ticks[0] >= 16:
        ticks.insert(0, ticks[0] // 4)
    while ticks[-1] * 2 <= result.longest:
        ticks.append(ticks[-1] * 2)
    for axes in (left, right):
        _length_axis(axes, result, ticks)
        axes.set_xlabel("position of the target (tokens before it)")
    _finish(left, right, result.by_position)
    return figure


def _panels(result: SweepResult, title: str) -> tuple[Figure, Axes, Axes]:
    from matplotlib.figure import Figure

    # Figure, not pyplot: no global state, no display, Agg by default.
    figure = Figure(figsize=(11, 5.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(
        f"{title}: {result.windows:,} windows of {result.documents} held-out documents", fontsize=13
    )
    left.set_title("Perplexity (lower is better)", fontsize=11)
    right.set_title("Difference to cropped (below 0: the longer context helps)", fontsize=11)
    left.set_ylabel("perplexity, logarithmic")
    right.set_ylabel("nats per token")
    return figure, left, right


def _curves(left: Axes, right: Axes, row: str, x: Sequence[float], points: Sequence[_Point]) -> None:
    style = {"linewidth": 1.8, "markersize": 6, "label": LABELS[row], **_STYLES[row]}
    nll = [point.nll.perplexity for point in points]
    gap = [point.minus_cropped for point in points]
    left.plot(x, [mean for mean, _, _ in nll], **style)
    right.plot(x, [g.mean for g in gap], **style)
    if row == CROPPED:
        # Documents differ far more than methods do: one band of the level is enough to say how much.
        left.fill_between(
            x, [low for _, low, _ in nll], [high for *_, high in nll], color="#000000", alpha=0.08, lw=0
        )
    else:
        right.fill_between(
            x, [g.low for g in gap], [g.high for g in gap], color=style["color"], alpha=0.18, lw=0
        )


def _length_axis(axes: Axes, result: SweepResult, ticks: list[int]) -> None:
    from matplotlib.ticker import NullFormatter

    axes.set_xscale("log", base=2)
    trained = result.trained_seq_len
    # The line's name is a tick label: inside the axes it would cover a curve sooner or later.
    axes.set_xticks(ticks, [f"{tick:,}\ntrained" if tick == trained else f"{tick:,}" for tick in ticks])
    axes.tick_params(axis="x", labelsize=9)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(trained, color="#777777", linewidth=1.2, linestyle=":")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _finish(left: Axes, right: Axes, points: Sequence[_Point]) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    handles, labels = left.get_legend_handles_labels()
    if any(point.nll.clusters > 1 for point in points):
        handles.append(Patch(color="#999999", alpha=0.35, lw=0))
        labels.append("95 % interval")
    left.figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    left.set_yscale("log")
    shown = [point for point in points if point.minus_cropped.mean <= _NATS_SHOWN]
    if len(shown) < len(points):
        _clip(left, 1.2 * max(point.nll.perplexity[0] for point in shown), "{:,.0f}")
        _clip(right, _NATS_SHOWN, "+{:.1f}")
    low, high = left.get_ylim()
    # Most often perplexities span less than a decade, where logarithmic ticks leave a label or two.
    left.yaxis.set_major_locator(MaxNLocator(nbins=8) if high < 16 * low else LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:,.4g}"))
    left.yaxis.set_minor_locator(NullLocator())


def _clip(axes: Axes, top: float, form: str) -> None:
    """End the axis at ``top`` and write the last value of each curve that ends beyond."""
    axes.set_ylim(top=top)
    above = 0
    for line in axes.get_lines():
        end = float(np.asarray(line.get_ydata())[-1])
        if line.get_label() in LABELS.values() and end > top:
            axes.annotate(
                f"{line.get_label()} \N{UPWARDS ARROW} {form.format(end)}",
                (1.0, 1.0),
                xycoords="axes fraction",
                xytext=(-4, -4 - 14 * above),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=9,
                color=line.get_color(),
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
            )
            above += 1
