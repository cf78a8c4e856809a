"""How retrieval is shown: a heat map by length and depth, lines of results.jsonl, a table, a section of the page."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from roformer_dist.extrapolation.result import LABELS
from roformer_dist.extrapolation.retrieval import ANSWER, CUE, DEPTHS, RetrievalResult, retrieval_findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table


def retrieval_figure(result: RetrievalResult) -> Figure:
    """A column for each method; above, passages that were repeated; below, what they are worth in nats."""
    from matplotlib.figure import Figure

    columns = len(result.methods)
    figure = Figure(figsize=(max(11, 3.1 * columns), 6.4), dpi=130, layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False, sharex=True, sharey=True)
    figure.suptitle(
        f"A passage of {CUE + ANSWER} tokens, asked for by its first {CUE}: {result.trials} trials a cell",
        fontsize=13,
    )
    points = [
        [[result.at(m, length, depth) for length in result.lengths] for depth in DEPTHS]
        for m in result.methods
    ]
    gains = np.array([[[p.gain.mean for p in row] for row in of_method] for of_method in points])
    # Below a nat a token nothing is found; a narrower scale would paint noise.
    top = max(1.0, float(gains.max()))
    for column, (method, of_method) in enumerate(zip(result.methods, points)):
        shares = np.array([[p.recalled / p.trials for p in row] for row in of_method])
        upper = _heat_map(axes[0, column], shares, 1.0, "{:.0%}")
        lower = _heat_map(axes[1, column], gains[column], top, "{:+.2f}")
        axes[0, column].set_title(LABELS[method], fontsize=11)
        axes[1, column].set_xlabel("context length (tokens)")
        if column == columns - 1:
            figure.colorbar(upper, ax=axes[0, column], label="repeated exactly")
            figure.colorbar(lower, ax=axes[1, column], label="nats per token\nthat the passage is worth")
    for row in range(2):
        axes[row, 0].set_ylabel("depth of the passage")
        axes[row, 0].set_yticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS])
    trained = result.trained_seq_len
    ticks = [f"{n:,}\ntrained" if n == trained else f"{n:,}" for n in result.lengths]
    axes[0, 0].set_xticks(range(len(ticks)), ticks, fontsize=8)
    return figure


def _heat_map(axes: Axes, values: np.ndarray, top: float, form: str) -> Any:
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value < 0.55 * top else "black"
        axes.text(column, row, form.format(value), ha="center", va="center", fontsize=8, color=colour)
    return image


def retrieval_lines(result: RetrievalResult) -> Iterator[dict[str, Any]]:
    """A line of ``results.jsonl`` for each method, length and depth, null being without a passage."""
    for point in result.points:
        yield {
            "kind": "retrieval",
            "method": point.method,
            "length": point.length,
            "depth": point.depth,
            "distance": point.distance,
            "recalled": point.recalled,
            "trials": point.trials,
            "gain": point.gain.mean,
            "gain_interval": point.gain.interval,
        }


def retrieval_table(result: RetrievalResult) -> Table:
    """Passages repeated over all depths by method and length, for the terminal."""
    from rich.table import Table

    table = Table(
        title="Passages of another document repeated when asked for, and nats per token they are worth",
        caption=f"{len(DEPTHS)} depths, {result.trials} trials each; trained length {result.trained_seq_len:,}",
    )
    table.add_column("method")
    for length in result.lengths:
        table.add_column(f"{length:,}", justify="right")
    for method in result.methods:
        cells = []
        for length in result.lengths:
            recalled, trials = result.recalled(method, length)
            gain = np.mean([result.at(method, length, depth).gain.mean for depth in DEPTHS])
            cells.append(f"{recalled}/{trials}  {gain:+.2f}")
        table.add_row(LABELS[method], *cells)
    return table


def retrieval_section(result: RetrievalResult, figure: str) -> str:
    """The part of the page; ``figure`` is its picture as HTML."""
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in retrieval_findings(result))
    guessed = sum(result.at(m, n, None).recalled for m in result.methods for n in result.lengths)
    return f"""<h2>Retrieval by depth</h2>
<ul>{said}</ul>
{figure}
<p>A passage of {CUE + ANSWER} tokens of another held-out document stands at a depth of the text, and the text ends with
its first {CUE} tokens. Above: how often the network generates the other {ANSWER} exactly. Below: by how many nats per
token the passage lowers their loss, against the same text without it (where {guessed} answers were guessed).
A cropped model cannot know a passage that is farther back than the trained length.</p>
"""
