"""Files of a sweep: results.jsonl, figures, a page that can be mailed, TensorBoard, a terminal table."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roformer_dist.extrapolation.intervals import Estimate
from roformer_dist.extrapolation.page import render_page
from roformer_dist.extrapolation.result import CROPPED, LABELS, SweepResult
from roformer_dist.extrapolation.retrieval import RetrievalResult
from roformer_dist.extrapolation.retrieval_report import retrieval_figure, retrieval_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass(frozen=True)
class Source:
    """What was evaluated, for the reader: the checkpoint's name, its step, the documents' name."""

    checkpoint: str
    step: int
    documents: str


def write_report(
    result: SweepResult,
    source: Source,
    out_dir: str | Path,
    *,
    tensorboard_dir: str | Path | None,
    retrieval: RetrievalResult | None = None,
) -> list[Path]:
    """Write the report into ``out_dir`` (made if missing), each file whole or not at all.

    Args:
        retrieval: of the same checkpoint and documents; None leaves it out.
        tensorboard_dir: the run's TensorBoard folder; its subfolder ``extrapolation`` gets the figures
            and perplexities, with the context length as step, and replaces what an earlier sweep of the
            same step left there. None writes none.

    Returns:
        The files, ``report.html`` first.
    """
    from roformer_dist.extrapolation.figures import by_length_figure, by_position_figure

    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "perplexity_by_length": by_length_figure(result),
        "perplexity_by_position": by_position_figure(result),
    }
    lines = [*result_lines(result, source)]
    if retrieval is not None:
        figures["retrieval_by_depth"] = retrieval_figure(retrieval)
        lines += retrieval_lines(retrieval)
    pngs = {name: _png(figure) for name, figure in figures.items()}
    page = render_page(result, source.checkpoint, source.step, source.documents, pngs, retrieval)
    files = {
        "report.html": page.encode(),
        "results.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode(),
        **{f"{name}.png": png for name, png in pngs.items()},
    }
    for name, content in files.items():
        _write(folder / name, content)
    if tensorboard_dir is not None:
        _write_tensorboard(result, source, figures, Path(tensorboard_dir), retrieval)
    return [folder / name for name in files]


def result_lines(result: SweepResult, source: Source) -> Iterator[dict[str, Any]]:
    """The lines of ``results.jsonl``: one ``sweep``, then one a (method, length) and (method, bucket).

    ``nll`` and ``minus_cropped`` are in nats, with ``[low, high]`` of their 95 % interval, null where
    one document leaves none.
    """
    yield {
        "kind": "sweep",
        "checkpoint": source.checkpoint,
        "step": source.step,
        "held_out": source.documents,
        "trained_seq_len": result.trained_seq_len,
        "windows": result.windows,
        "documents": result.documents,
        "documents_too_short": result.too_short,
        "targets_per_window": result.scored,
        "tokens_fed": result.tokens,
    }
    for point in result.by_length:
        where = {"kind": "length", "method": point.method, "length": point.length}
        yield where | _numbers(point.factor, point.nll, point.minus_cropped)
    for point in result.by_position:
        where = {"kind": "position", "method": point.method, "first": point.first, "last": point.last}
        yield where | _numbers(point.factor, point.nll, point.minus_cropped)


def result_table(result: SweepResult) -> Table:
    """Perplexity by method and length for the terminal; the best of a column is bold and starred."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"Perplexity of the same {result.targets:,} targets by context length",
        caption=(
            "± half the 95 % interval of the difference to cropped, in perplexity; * best; "
            f"trained length {result.trained_seq_len:,}; {result.documents} documents"
        ),
    )
    table.add_column("method")
    for length in result.lengths:
        table.add_column(f"{length:,}", justify="right")
    for row in result.rows:
        cells = []
        for length in result.lengths:
            point = result.at(row, length)
            value = point.nll.perplexity[0]
            half = (point.minus_cropped.high - point.minus_cropped.low) / 2 * value
            text = f"{value:,.1f}" + (f" ±{half:.1f}" if half > 0 else "")
            best = result.best(length) == row
            cells.append(Text(text + (" *" if best else "  "), style="bold green" if best else ""))
        table.add_row(LABELS[row], *cells, end_section=row == CROPPED)
    return table


def _numbers(factor: float, nll: Estimate, minus_cropped: Estimate) -> dict[str, Any]:
    return {
        "factor": factor,
        "n": nll.n,
        "documents": nll.clusters,
        "nll": nll.mean,
        "nll_interval": nll.interval,
        "perplexity": nll.perplexity[0],
        "minus_cropped": minus_cropped.mean,
        "minus_cropped_interval": minus_cropped.interval,
    }


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_tensorboard(
    result: SweepResult,
    source: Source,
    figures: dict[str, Figure],
    folder: Path,
    retrieval: RetrievalResult | None,
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    # A folder of its own keeps lengths, the steps here, apart from the run's training steps.
    own = folder / "extrapolation" / f"step_{source.step:06d}"
    for old in own.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(own)) as writer:
        for name, figure in figures.items():
            writer.add_figure(f"extrapolation/{name}", figure, result.longest, close=False)
        for point in result.by_length:
            tag = f"extrapolation/perplexity/{point.method}"
            writer.add_scalar(tag, point.nll.perplexity[0], point.length)
        if retrieval is None:
            return
        for method, length in product(retrieval.methods, retrieval.lengths):
            recalled, trials = retrieval.recalled(method, length)
            writer.add_scalar(f"extrapolation/recalled/{method}", recalled / trials, length)
