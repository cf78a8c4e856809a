"""bench memory's line, and bench gpu but for the GPU: its arithmetic, and its child at a tiny size on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from roformer_dist.bench import gpu, gpu_child
from roformer_dist.bench.gpu import GpuJob, GpuModel, gpu_groups
from roformer_dist.bench.harness import Sample
from roformer_dist.bench.memory import MemorySettings, fit, memory_groups
from roformer_dist.bench.run import gpu_plan
from roformer_dist.bench.train import Job
from roformer_dist.model.roformer import build_model
from roformer_dist.parallel import ring

TINY = GpuModel(
    vocab_size=31, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24
)


def test_the_line_is_least_squares_with_its_largest_residual() -> None:
    exact = fit({1000: 5e6 + 1000 * 70, 2000: 5e6 + 2000 * 70, 8000: 5e6 + 8000 * 70})
    assert (exact.slope, exact.intercept, exact.residual) == pytest.approx((70, 5e6, 0))
    bent = fit({0: 1.0, 1: 1.0, 2: 4.0})
    # Normal equations by hand: slope 1.5, intercept 0.5; distances 0.5, 1 and 0.5.
    assert (bent.slope, bent.intercept, bent.residual) == pytest.approx((1.5, 0.5, 1.0))


def test_memory_measures_each_variant_at_each_length() -> None:
    groups = memory_groups(MemorySettings((100, 250, 300), "bf16", 1, document=100))
    jobs = [Job.from_json(c.command[-1]) for c in groups[1].contenders]
    assert [job.documents for job in jobs] == [(100, 100, 50)] * 5
    assert [(job.checkpointing, bool(job.mlp_tile_tokens)) for job in jobs] == [
        ("none", False),
        ("none", True),
        ("selective", False),
        ("full", False),
        ("full", True),
    ]
    with pytest.raises(ValueError, match="three lengths"):
        MemorySettings((100, 200), "bf16", 1, document=100)


def test_weights_and_operations_by_hand() -> None:
    network = build_model(gpu_child.model_config(TINY), masked=False, seed=0)
    matrices = sum(p.numel() for n, p in network.named_parameters() if p.ndim == 2 and "embedding" not in n)
    assert TINY.matrix_weights == matrices
    # 6 a weight, and 12 x 2 layers x 16 query dimensions x the 50 visible of 100 keys.
    assert TINY.step_flops(100, causal_halved=True) == 100 * (6 * matrices + 12 * 2 * 16 * 50)
    assert TINY.step_flops(100, causal_halved=False) == 100 * (6 * matrices + 12 * 2 * 16 * 100)
    assert GpuModel().matrix_weights == pytest.approx(1.0e9, rel=0.1)


@pytest.mark.parametrize(
    "job",
    [
        GpuJob("attention", "auto", 64, TINY, steps=1, device="cpu"),
        GpuJob("step", "ours", 64, TINY, steps=1, device="cpu", mlp_tile_tokens=20),
        GpuJob("step", "ours", 64, TINY, steps=1, device="cpu", checkpointing="full", offload=True),
    ],
    ids=["attention", "step", "step offloaded"],
)
def test_a_sample_reports_its_figures(job: GpuJob, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_child.main(GpuJob.from_json(job.to_json()))
    said = json.loads(capsys.readouterr().out)
    assert said["tokens"] == 64
    assert 0 < said["share"] < said["full_share"]
    assert said["tokens_per_second"] == pytest.approx(64 / said["seconds"])


@pytest.mark.parametrize(("ulysses_size", "ring_size"), [(1, 1), (1, 4), (2, 2)])
def test_a_row_over_in_process_ranks_is_one_call_in_numbers_and_in_work(
    ulysses_size: int, ring_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    job = GpuJob("spread", "mesh", 96, TINY, 1, "cpu", ulysses_size=ulysses_size, ring_size=ring_size)
    gpu_child.main(job)
    said = json.loads(capsys.readouterr().out)
    assert gpu.near_one_call(Sample(1.0, 1, {}), Sample(1.0, 1, said)) is None
    assert (max(said["errors"].values()) > 0) == (ring_size > 1)
    # Every visible pair is computed once, on whichever rank.
    assert sum(said["hop_share_of_work"]) == pytest.approx(1)
    assert [len(way) for way in said["hop_efficiency"]] == [ring_size] * 2
    assert said["efficiency"] == pytest.approx(sum(said["one_call_seconds"]) / said["seconds"])
    assert f"{said['efficiency']:.2f} of one call's rate" in gpu._figures(Sample(1.0, 1, said))


def test_a_ring_that_leaves_out_a_hop_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ring.plan_hops
    monkeypatch.setattr(ring, "plan_hops", lambda *given: plan(*given)[:-1])
    gpu_child.main(GpuJob("spread", "ring 4", 96, TINY, 1, "cpu", ring_size=4))
    complaint = gpu.near_one_call(Sample(1.0, 1, {}), Sample(1.0, 1, json.loads(capsys.readouterr().out)))
    assert "differs from one call's by" in str(complaint)


def test_the_longest_row_is_found_by_bisection(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def work_for(tokens: int) -> object:
        tried.append(tokens)
        if tokens > 1000:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return lambda: None

    monkeypatch.setattr(gpu_child, "step_work", lambda job, device: work_for)
    tokens, _ = gpu_child.longest(GpuJob("longest", "ours", 128, TINY), torch.device("cpu"))
    assert tried[:4] == [128, 256, 512, 1024]
    assert 1000 * 15 / 16 <= tokens <= 1000


def test_each_gpu_task_has_its_contenders_and_a_missing_one_says_why() -> None:
    groups = gpu_groups(gpu.TASKS, {"flash_attn": "not installed: pip install it"})
    assert len(groups) == 6 + 2 + 3 + 2
    assert [c.missing for c in groups[0].contenders] == [None, "not installed: pip install it"]
    names = [[c.name for c in group.contenders] for group in groups]
    assert names[6] == ["one call", "ring 4", "ring 8", "ulysses 4 x ring 2", "ulysses 2 x ring 4"]
    assert names[8] == ["ours", "hf-llama"]
    assert names[10] == ["ours", "hf-llama", "ours selective"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_there_is_one_line() -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        gpu_plan(("step",), 1, 60.0)
    with pytest.raises(ValueError, match="choose from attention, spread, step, longest"):
        gpu_plan(("steps",), 1, 60.0)
