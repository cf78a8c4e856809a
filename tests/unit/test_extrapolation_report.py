"""The report's files: complete, self-contained, safe to open, and true to the result."""

from __future__ import annotations

import io
import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from roformer_dist.extrapolation.figures import by_length_figure, by_position_figure
from roformer_dist.extrapolation.intervals import Estimate
from roformer_dist.extrapolation.report import Source, result_table, write_report
from roformer_dist.extrapolation.result import (
    CROPPED,
    LABELS,
    LengthPoint,
    PositionPoint,
    SweepResult,
    findings,
)
from roformer_dist.extrapolation.retrieval import DEPTHS, RetrievalPoint, RetrievalResult
from roformer_dist.extrapolation.retrieval_report import retrieval_table

NASTY = 'runs/"><img src=x onerror=alert(1)><script>alert(2)</script>&amp'


def estimate(mean: float, half: float = 0.01) -> Estimate:
    return Estimate(mean, mean - half, mean + half, 128, 3)


def result(unscaled: float = 0.4, half: float = 0.01) -> SweepResult:
    """Literal numbers: YaRN below cropped at 1,024, unscaled ``unscaled`` nats above."""
    gaps = {CROPPED: 0.0, "none": unscaled, "yarn": -0.02}
    lengths = [
        LengthPoint(
            row, length, 1.0, estimate(5 + gap * (length > 512), half), estimate(gap * (length > 512), half)
        )
        for row, gap in gaps.items()
        for length in (512, 1024)
    ]
    positions = [
        PositionPoint(
            row, first, last, 2.0, estimate(5 + gap * (last > 512), half), estimate(gap * (last > 512), half)
        )
        for row, gap in gaps.items()
        for first, last in ((1, 16), (17, 512), (513, 1024))
    ]
    return SweepResult(
        512, (512, 1024), ("none", "yarn"), 256, 4, 3, 1, 9999, tuple(lengths), tuple(positions)
    )


def retrieval() -> RetrievalResult:
    """YaRN finds everything, unscaled RoPE only what is near."""
    points = [
        RetrievalPoint(
            method,
            length,
            depth,
            0 if depth is None else int(length * (1 - depth)),
            3 * (depth is not None and (method == "yarn" or depth == 1)),
            3,
            estimate(0 if depth is None else 2.0 if method == "yarn" else 0.1),
        )
        for method in ("none", "yarn")
        for length in (512, 1024)
        for depth in (None, *DEPTHS)
    ]
    return RetrievalResult(512, (512, 1024), ("none", "yarn"), 3, tuple(points))


class Page(HTMLParser):
    """Tags, attribute values and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.values: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report, to be read only."""
    path = tmp_path_factory.mktemp("report")
    source = Source(NASTY, 300, "shards & <b>more</b>")
    board = path / "tensorboard"
    files = write_report(result(), source, path / "out", tensorboard_dir=board, retrieval=retrieval())
    assert sorted(file.name for file in files) == sorted(file.name for file in (path / "out").iterdir())
    return path


@pytest.fixture
def written(folder: Path, tmp_path: Path) -> Path:
    """A copy of the report that may be changed."""
    return shutil.copytree(folder, tmp_path / "copy")


def test_page_is_self_contained_and_escapes_names(folder: Path) -> None:
    text = (folder / "out/report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    assert "script" not in page.tags
    assert page.tags.count("img") == 3
    assert not [name for name, _ in page.values if name.startswith("on")]
    sources = [value for name, value in page.values if name in ("src", "href")]
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert NASTY in page.text
    assert "shards & <b>more</b>" in page.text
    assert "b" not in {tag for tag in page.tags if tag == "more"}


def test_page_marks_the_best_of_each_column_once(folder: Path) -> None:
    text = (folder / "out/report.html").read_text(encoding="utf-8")
    assert text.count("<td class=best>") == 1
    assert f"<td class=best>★ {math.exp(4.98):,.1f}" in text
    assert "YaRN is 0.020 nats better than cropping (95 % interval -0.030 to -0.010)" in text


def test_lines_say_every_point(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == [
        *(["sweep"] + ["length"] * 6 + ["position"] * 9),
        *["retrieval"] * 2 * 2 * (1 + len(DEPTHS)),
    ]
    assert lines[0]["checkpoint"] == NASTY
    point = next(x for x in lines if x["kind"] == "length" and (x["method"], x["length"]) == ("yarn", 1024))
    assert point["nll"] == pytest.approx(4.98)
    assert point["perplexity"] == pytest.approx(math.exp(4.98))
    assert point["minus_cropped_interval"] == pytest.approx([-0.03, -0.01])
    assert point["n"] == 128


def test_what_is_retrieved_is_said_on_the_page_in_the_lines_and_in_the_table(folder: Path) -> None:
    page = Page((folder / "out/report.html").read_text(encoding="utf-8"))
    assert "At 1,024 tokens YaRN repeats 6 of 6 passages from farther back" in page.text
    assert "At 1,024 tokens RoPE, unscaled repeats 0 of 6 passages" in page.text
    lines = [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()]
    points = [line for line in lines if line["kind"] == "retrieval"]
    (point,) = (x for x in points if (x["method"], x["length"], x["depth"]) == ("none", 512, 1))
    assert (point["recalled"], point["trials"], point["gain"]) == (3, 3, 0.1)
    (rows,) = (list(column.cells) for column in retrieval_table(retrieval()).columns[2:])
    assert rows == ["3/15  +0.10", "15/15  +2.00"]


def test_without_retrieval_the_report_has_none(tmp_path: Path) -> None:
    write_report(result(), Source("a", 1, "b"), tmp_path, tensorboard_dir=None)
    assert not (tmp_path / "retrieval_by_depth.png").exists()
    assert "Retrieval by depth" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_figures_are_readable_pngs(folder: Path) -> None:
    import matplotlib.image

    for name in ("perplexity_by_length.png", "perplexity_by_position.png", "retrieval_by_depth.png"):
        image = matplotlib.image.imread(io.BytesIO((folder / "out" / name).read_bytes()), format="png")
        assert image.shape[1] >= 1200
        assert image[..., :3].std() > 0.05


def test_tensorboard_has_figures_and_scalars_and_a_second_sweep_replaces_them(written: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = written / "tensorboard/extrapolation/step_000300"
    write_report(
        result(), Source("again", 300, "x"), written / "out", tensorboard_dir=written / "tensorboard"
    )
    events = EventAccumulator(str(board)).Reload()
    assert set(events.Tags()["images"]) == {
        "extrapolation/perplexity_by_length",
        "extrapolation/perplexity_by_position",
    }
    scalars = events.Scalars("extrapolation/perplexity/yarn")
    assert [(s.step, round(s.value, 2)) for s in scalars] == [
        (512, round(math.exp(5), 2)),
        (1024, round(math.exp(4.98), 2)),
    ]
    assert len(list(board.iterdir())) == 1


def test_a_failed_write_leaves_the_old_file(written: Path, monkeypatch) -> None:
    before = (written / "out/report.html").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(result(), Source("new", 1, "x"), written / "out", tensorboard_dir=None)
    assert (written / "out/report.html").read_bytes() == before
    assert not list((written / "out").glob(".*"))


@pytest.mark.parametrize("draw", [by_length_figure, by_position_figure])
def test_an_exploding_curve_does_not_flatten_the_others(draw) -> None:
    left, right = draw(result(unscaled=6.0)).axes
    assert left.get_ylim()[1] < 2 * math.exp(5)
    assert right.get_ylim()[1] == 1.0
    assert any("59,874" in text.get_text() for text in left.texts)
    calm_left, _ = draw(result()).axes
    assert calm_left.get_ylim()[1] > math.exp(5.4)
    assert not calm_left.texts


@pytest.mark.parametrize("unscaled", [0.02, 0.9, 6.0])
@pytest.mark.parametrize("half", [0.001, 1.5])
def test_perplexity_axis_has_labels_at_any_range(unscaled: float, half: float) -> None:
    left, _ = by_position_figure(result(unscaled, half)).axes
    low, high = left.get_ylim()
    assert sum(low <= tick <= high for tick in left.get_yticks()) >= 3


def test_figures_name_axes_units_and_the_trained_length() -> None:
    figure = by_length_figure(result())
    left, right = figure.axes
    assert "tokens" in left.get_xlabel()
    assert "nats" in right.get_ylabel()
    assert left.get_xscale() == "log"
    assert "512\ntrained" in [label.get_text() for label in left.get_xticklabels()]
    styles = {line.get_label(): line.get_linestyle() for line in left.get_lines()}
    assert styles[LABELS[CROPPED]] == "--"
    assert styles[LABELS["none"]] == "-"
    assert len(figure.legends) == 1


def test_table_and_findings() -> None:
    from rich.console import Console

    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(result_table(result()))
    text = console.export_text()
    assert f"{math.exp(4.98):,.1f} ±1.5 *" in text
    assert text.count(" *") == 2  # the best, and its explanation
    assert findings(result(half=0.5))[1].startswith("At 1,024 tokens YaRN cannot be told from cropping")
    assert "no interval" in findings(result(half=math.nan))[0]


def test_one_document_leaves_no_interval_and_valid_json(tmp_path: Path) -> None:
    write_report(result(half=math.nan), Source("x", 1, "y"), tmp_path, tensorboard_dir=None)
    text = (tmp_path / "results.jsonl").read_text()
    assert "NaN" not in text
    assert json.loads(text.splitlines()[1])["nll_interval"] is None
    assert "nan" not in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
