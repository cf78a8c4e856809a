"""metrics.jsonl and TensorBoard: one point per key and step, also after a kill and a resume."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from roformer_dist.config.data import CausalObjective, ClassificationObjective, MaskedObjective
from roformer_dist.config.model import ModelConfig
from roformer_dist.engine.metrics import (
    MetricsLog,
    flops_per_token,
    matrix_product_rate,
    memory_metrics,
    read_metrics,
)
from roformer_dist.model.roformer import build_model


def write(run_dir: Path, resume_step: int, steps: range, offset: float = 0.0) -> None:
    """One start of a run, which logs ``loss = offset + step`` at each of ``steps``."""
    log = MetricsLog(run_dir, resume_step)
    for step in steps:
        log.log(step, {"loss": offset + step, "validation/loss": offset - step})
    log.close()
    # Event files are read in the order of their names, which begin with the second they were made in. The
    # starts of a real run are further apart than those of this test.
    folder = run_dir / "tensorboard"
    (new,) = (path for path in folder.iterdir() if not path.name.endswith(".start"))
    new.rename(folder / f"events.out.tfevents.{len(list(folder.iterdir())):010d}.start")


def jsonl(run_dir: Path) -> list[tuple[int, float]]:
    return [(point["step"], point["loss"]) for point in read_metrics(run_dir)]


def tensorboard(run_dir: Path, tag: str = "loss") -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_what_is_logged_can_be_read_back(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    write(tmp_path, 0, range(1, 4))
    points = read_metrics(tmp_path)
    assert [set(p) for p in points] == [{"step", "time", "loss", "validation/loss"}] * 3
    assert jsonl(tmp_path) == tensorboard(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert tensorboard(tmp_path, "validation/loss") == [(1, -1.0), (2, -2.0), (3, -3.0)]


@pytest.mark.parametrize("resume_step", [0, 1, 3, 6])
def test_resuming_drops_the_points_that_will_be_made_again(tmp_path: Path, resume_step: int) -> None:
    write(tmp_path, 0, range(1, 7))
    write(tmp_path, resume_step, range(resume_step + 1, 9), offset=100)
    expected = [(step, float(step)) for step in range(1, resume_step + 1)]
    expected += [(step, 100.0 + step) for step in range(resume_step + 1, 9)]
    assert jsonl(tmp_path) == expected
    assert tensorboard(tmp_path) == expected


def test_resuming_three_times_leaves_no_duplicate_step(tmp_path: Path) -> None:
    for start, (resume_step, stop) in enumerate([(0, 6), (4, 9), (2, 5), (4, 8)]):
        write(tmp_path, resume_step, range(resume_step + 1, stop), offset=100 * start)
    steps = [step for step, _ in tensorboard(tmp_path)]
    assert steps == sorted(set(steps)) == list(range(1, 8))
    assert jsonl(tmp_path) == tensorboard(tmp_path)


@pytest.mark.parametrize("cut", ['{"step": 4, "lo', "{", '{"step": 4, "loss": 1.0', "\x00\x00\x00"])
def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path, cut: str) -> None:
    write(tmp_path, 0, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + cut)
    assert [step for step, _ in jsonl(tmp_path)] == [1, 2, 3]
    write(tmp_path, 3, range(4, 6))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_whole_line_without_its_newline_is_kept_whole(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    write(tmp_path, 3, range(4, 5))
    assert [step for step, _ in jsonl(tmp_path)] == [1, 2, 3, 4]


def test_a_point_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.log(1, {"loss": 2.5})
    assert jsonl(tmp_path) == tensorboard(tmp_path) == [(1, 2.5)]
    log.close()


def test_a_loss_that_is_not_a_number_is_logged_as_such(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.log(1, {"loss": float("nan")})
    log.close()
    assert read_metrics(tmp_path)[0]["loss"] != read_metrics(tmp_path)[0]["loss"]


def test_text_is_shown_as_it_is(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.text(0, "config", "a = 1\nb = 2")
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("config/text_summary")
    assert event.tensor_proto.string_val == [b"    a = 1\n    b = 2"]


def test_host_memory_is_in_gib() -> None:
    values = memory_metrics(torch.device("cpu"))
    assert values.keys() == {"memory_host_gib"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    assert values["memory_host_gib"] == pytest.approx(peak, rel=0.05)


def model_config(**changes: object) -> ModelConfig:
    values = {"vocab_size": 50, "hidden_size": 16, "num_layers": 3, "num_heads": 4, "intermediate_size": 20}
    return ModelConfig(**values | changes)


CAUSAL = CausalObjective(kind="causal")
MASKED = MaskedObjective(kind="masked", mask_probability=0.25)
CLASSES = ClassificationObjective(kind="classification", num_labels=3)


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2}, {"mlp": "gelu"}, {"head_dim": 6}], ids=str)
def test_flops_are_six_for_each_weight_of_a_matrix_product(changes: dict[str, object]) -> None:
    model = model_config(**changes)
    network = build_model(model, masked=False, seed=0)
    weights = sum(
        p.numel() for p in network.parameters() if p.ndim > 1
    )  # the tied embedding is the output layer
    assert flops_per_token(model, [], CAUSAL) == 6 * weights


@pytest.mark.parametrize("changes", [{}, {"embedding_size": 8}, {"head_transform": False}], ids=str)
def test_flops_of_the_output_layer_count_at_the_tokens_to_predict(changes: dict[str, object]) -> None:
    model = model_config(**changes)
    network = build_model(model, masked=True, seed=0)
    sizes = {name: p.numel() for name, p in network.named_parameters() if p.ndim > 1}
    # The output layer is the tied embedding, which as a lookup costs nothing.
    head = sizes.pop("embedding.weight") + sizes.pop("head.transform.weight", 0)
    assert flops_per_token(model, [], MASKED) == 6 * (sum(sizes.values()) + 0.25 * head)
    assert flops_per_token(model, [], CLASSES) == 6 * sum(sizes.values())


def attention_flops(lengths: list[int], *, masked: bool = False, **changes: object) -> float:
    model = model_config(**changes)
    objective = MASKED if masked else CAUSAL
    full = flops_per_token(model, lengths, objective)
    return full - flops_per_token(model_config(), [], objective)


def test_flops_of_attention_grow_with_what_a_query_sees() -> None:
    # Scores and values, forward and twice backward: 2 * 2 * 3 for each key and channel.
    assert attention_flops([100], masked=True) == 12 * 3 * 16 * 100
    assert attention_flops([100]) == 12 * 3 * 16 * 50
    # 90 queries see 90 keys each, 10 see 10.
    assert attention_flops([90, 10], masked=True) == pytest.approx(12 * 3 * 16 * 82)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("window", [1, 64, 500])
def test_flops_of_a_sliding_layer_are_those_of_its_visible_keys(window: int, masked: bool) -> None:
    lengths = [300, 7, 150]
    found = attention_flops(
        lengths, masked=masked, layers=["sliding", "full", "no_position"], sliding_window=window
    )
    pairs = 0
    for n in lengths:
        distance = torch.arange(n)[:, None] - torch.arange(n)
        seen = distance.abs() < window
        # A query's own key lies on the diagonal, of which the area under a causal mask has half.
        pairs += float((seen & (distance > 0)).sum() + n / 2) * (2 if masked else 1)
    full = sum(n * n for n in lengths) * (1 if masked else 0.5)
    # A band of whole keys has half a key more or less at its edge than its area.
    half_keys = 0.5 * (2 if masked else 1) * sum(lengths)
    assert found * sum(lengths) / (12 * 16) == pytest.approx(pairs + 2 * full, abs=half_keys)


def test_flops_of_a_linear_layer_do_not_grow_with_the_length() -> None:
    # 4 query and 2 key heads of 4 x 4 numbers, multiplied and added, forward and twice backward.
    for lengths in ([10], [1000, 1000]):
        found = attention_flops(lengths, layers=["linear"], num_kv_heads=2)
        fewer = flops_per_token(model_config(num_kv_heads=2), [], CAUSAL)
        fewer -= flops_per_token(model_config(), [], CAUSAL)
        assert found - fewer == 3 * 6 * 16 * (4 + 2)
    mixed = attention_flops([1000], layers=["linear", "full", "full"])
    assert mixed == 6 * 16 * (4 + 4) + 2 * 12 * 16 * 500


def test_the_rate_of_this_machine_is_plausible() -> None:
    # Any machine does more than 100 MFLOP/s and less than 10 PFLOP/s: a unit or a size is wrong otherwise.
    assert 1e8 < matrix_product_rate(torch.device("cpu"), torch.float32) < 1e16
