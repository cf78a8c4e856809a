"""bench memory's line, and bench gpu but for the GPU: its arithmetic, and its child at a tiny size on the CPU."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch

from roformer_dist.bench import gpu, gpu_child, gpu_spread, gpu_timing
from roformer_dist.bench.gpu import GpuJob, GpuModel, gpu_groups
from roformer_dist.bench.harness import Sample
from roformer_dist.bench.memory import MemorySettings, fit, memory_groups
from roformer_dist.bench.run import gpu_plan
from roformer_dist.bench.train import Job
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.kernels.selfcheck import BOUND
from roformer_dist.model.memory import ActivationMemory
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
        GpuJob("numerics", "sdpa", 64, TINY, steps=1, device="cpu"),
        GpuJob("step", "ours", 64, TINY, steps=1, device="cpu", mlp_tile_tokens=20),
        GpuJob("step", "ours", 64, TINY, steps=1, device="cpu", checkpointing="full", offload=True),
    ],
    ids=["attention", "numerics", "step", "step offloaded"],
)
def test_a_sample_reports_its_figures(
    job: GpuJob, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    networks, apply = [], gpu_child.apply_options
    monkeypatch.setattr(gpu_child, "apply_options", lambda *given: networks.append(given[0]) or apply(*given))
    gpu_child.main(GpuJob.from_json(job.to_json()))
    assert len(networks) == (job.task == "step")
    for network in networks:
        assert network.memory == ActivationMemory(job.checkpointing, job.offload)  # pyright: ignore
        assert network.blocks[0].mlp.tile_tokens == job.mlp_tile_tokens
    said = json.loads(capsys.readouterr().out)
    assert said["tokens"] == 64
    assert 0 < said["share"] < said["full_share"]
    assert said["tokens_per_second"] == pytest.approx(64 / said["seconds"])
    assert ("of_ceiling" in said) == (job.task == "step")
    assert f"{said['share']:.1%} of the matrix rate" in gpu._figures(Sample(1.0, 1, said))


@pytest.mark.parametrize(("ulysses_size", "ring_size"), [(1, 1), (1, 4), (2, 2)])
def test_a_row_over_in_process_ranks_is_one_call_in_numbers_and_in_work(
    ulysses_size: int, ring_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    job = GpuJob("spread", "mesh", 96, TINY, 1, "cpu", ulysses_size=ulysses_size, ring_size=ring_size)
    gpu_child.main(job)
    said = json.loads(capsys.readouterr().out)
    assert gpu.near_one_call(Sample(1.0, 1, {}), Sample(1.0, 1, said)) is None
    assert list(said["errors"]) == ["out", "dq", "dk", "dv"]
    assert (max(said["errors"].values()) > 0) == (ring_size > 1)
    # Every visible pair is computed once, on whichever rank.
    assert sum(said["hop_share_of_work"]) == pytest.approx(1)
    assert [len(way) for way in said["hop_efficiency"]] == [ring_size] * 2
    assert said["efficiency"] == pytest.approx(sum(said["one_call_seconds"]) / said["seconds"])
    assert f"{said['efficiency']:.2f} of one call's rate" in gpu._figures(Sample(1.0, 1, said))


def test_the_kernel_is_as_efficient_in_a_mesh_where_its_time_is_in_proportion_to_visible_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        gpu_spread, "_call_seconds", lambda kernel, call, *rest: (call.pairs, 2.0 * call.pairs)
    )
    job = GpuJob("spread", "mesh", 96, TINY, 1, "cpu", ulysses_size=2, ring_size=2)
    seconds, said = gpu_spread.spread(job, torch.device("cpu"))
    assert seconds == 3 * TINY.num_heads * 96 * 97 / 2
    assert said["efficiency"] == pytest.approx(1)
    assert said["hop_efficiency"] == [pytest.approx([1, 1])] * 2


def test_a_ring_that_leaves_out_a_hop_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ring.plan_hops
    monkeypatch.setattr(ring, "plan_hops", lambda *given: plan(*given)[:-1])
    gpu_child.main(GpuJob("spread", "ring 4", 96, TINY, 1, "cpu", ring_size=4))
    complaint = gpu.near_one_call(Sample(1.0, 1, {}), Sample(1.0, 1, json.loads(capsys.readouterr().out)))
    assert "differs from one call's by" in str(complaint)
    no_number = Sample(1.0, 1, {"errors": {"dq": float("nan")}})
    assert "dq differs" in str(gpu.near_one_call(Sample(1.0, 1, {}), no_number))


def test_the_longest_row_is_found_by_bisection(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def work_for(tokens: int) -> object:
        tried.append(tokens)
        if tokens > 1000:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return lambda: None

    monkeypatch.setattr(gpu_child, "step_work", lambda job, device: work_for)
    tokens, _, bound = gpu_child.longest(GpuJob("longest", "ours", 128, TINY), torch.device("cpu"))
    assert tried[:4] == [128, 256, 512, 1024]
    assert 1000 * 15 / 16 <= tokens <= 1000
    assert bound == "memory"
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in said] == [str(n) for n in tried if n <= 1000]


def test_the_longest_row_is_not_looked_for_beyond_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of n tokens takes (n / 64k)^2 s in this world, three times up to 128k and once above."""
    clock, runs = [0.0], []

    def seconds(work: int, count: int, device: torch.device, warmups: int = 2) -> float:
        took = (work / 65536) ** 2
        clock[0] += (count + warmups) * took
        runs.append((work, count + warmups))
        return took

    monkeypatch.setattr(gpu_child, "step_work", lambda job, device: lambda tokens: tokens)
    monkeypatch.setattr(gpu_child, "median_seconds", seconds)
    monkeypatch.setattr(gpu_child.time, "monotonic", lambda: clock[0])
    found = gpu_child.longest(GpuJob("longest", "ours", 65536, TINY, limit_s=90.0), torch.device("cpu"))
    assert runs == [(65536, 3), (131072, 3), (262144, 1)]
    assert clock[0] <= 90.0 < clock[0] + 64
    assert found == (262144, 16.0, "time")
    # The warm-ups of a row count: 128k would take 4 s three times.
    clock[0] = 0.0
    found = gpu_child.longest(GpuJob("longest", "ours", 65536, TINY, limit_s=10.0), torch.device("cpu"))
    assert (found, clock[0]) == ((65536, 1.0, "time"), 3.0)


def test_a_time_is_the_median_of_the_runs_after_the_warm_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seconds = [0.0], iter([0.5, 0.25, 1.0, 5.0, 3.0])

    def work() -> None:
        clock[0] += next(seconds)

    monkeypatch.setattr(gpu_timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert gpu_timing.median_seconds(work, 3, torch.device("cpu")) == 3.0


def test_the_ceiling_is_matrix_products_and_attention_at_their_own_rates() -> None:
    job = GpuJob("step", "ours", 100, TINY)
    said = gpu_child.ceiling(job, seconds=4.0, rate=1e6, attention=0.25)
    assert said["ceiling_seconds"] == pytest.approx(6 * TINY.matrix_weights * 100 / 1e6 + 2 * 0.25)
    assert said["of_ceiling"] == pytest.approx(said["ceiling_seconds"] / 4)
    # One layer's: what a step has of attention, without its weights, over the layers.
    attention = TINY.step_flops(100, causal_halved=True) - 6 * TINY.matrix_weights * 100
    assert said["kernel_tera_flops"] == pytest.approx(attention / TINY.num_layers / 0.25 / 1e12)


def test_the_targets_stand_beside_what_was_measured() -> None:
    said = {"tokens": 32768, "of_ceiling": 0.86, "ceiling_seconds": 1.25, "matmul_tera_flops": 700.0}
    line = gpu._ceiling(Sample(1.0, 1, {**said, "kernel_tera_flops": 400.0, "share": 0.49}), targets=True)
    assert line == (
        "32,768 tokens: 0.86 of the ceiling, which is 1.25 s with matrix products at 700 and attention at 400 TFLOP/s; "
        "target 0.85: met; causal MFU 49.0%, target 50%: missed"
    )


def test_the_errors_of_a_kernel_are_shown_by_dtype_and_head_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_child, "HEAD_DIMS", (32, 64))
    job = GpuJob("numerics", "sdpa", 64, TINY, device="cpu")
    found = gpu_child.numerics(job, torch.device("cpu"))
    assert list(found) == ["bfloat16", "float32"]
    for dtype, bound in (("bfloat16", BOUND), ("float32", 1e-5)):
        assert list(found[dtype]) == [32, 64]
        for errors in found[dtype].values():
            assert list(errors) == ["out", "lse", "dq", "dk", "dv"]
            assert 0 < max(errors.values()) < bound
    lines = gpu._numerics(Sample(1.0, 1, json.loads(json.dumps({"numerics": found}))))
    assert len(lines) == 4
    assert re.match(r"bfloat16, head_dim 32: out \d\.\de-\d\d, lse .*, dq .*, dk .*, dv ", lines[0])
    # A kernel whose gradient is wrong is shown with the error, and not left out.
    backward = SdpaKernel.backward
    monkeypatch.setattr(SdpaKernel, "backward", lambda *given: tuple(2 * x for x in backward(*given)))
    assert gpu_child.numerics(job, torch.device("cpu"))["bfloat16"][64]["dq"] > 0.5


def test_each_gpu_task_has_its_contenders_and_a_missing_one_says_why() -> None:
    groups = gpu_groups(gpu.TASKS, {"flash_attn": "not installed: pip install it"})
    assert len(groups) == 1 + 6 + 2 + 3 + 4
    for group in groups[:7]:
        assert [c.missing for c in group.contenders] == [None, "not installed: pip install it"]
    names = [[c.name for c in group.contenders] for group in groups]
    assert names[7] == ["one call", "ring 4", "ring 8", "ulysses 4 x ring 2", "ulysses 2 x ring 4"]
    assert all(group.check is gpu.near_one_call for group in groups[7:9])
    assert names[9] == ["ours", "hf-llama"]
    assert names[11] == ["ours", "hf-llama", "ours selective", "ours none"]
    assert names[12:] == [["ours"], ["ours"], ["ours", "hf-llama"], ["ours"]]
    fixed = [GpuJob.from_json(group.contenders[0].command[-1]) for group in groups[12:14]]
    assert [(job.tokens, job.model.num_layers, job.steps, job.warmups) for job in fixed] == [
        (524288, 16, 1, 0),
        (1048576, 4, 1, 0),
    ]
    assert "4 of the 16 layers at full width" in groups[13].title
    jobs = [GpuJob.from_json(c.command[-1]) for group in groups[9:12] for c in group.contenders]
    assert all((job.mlp_tile_tokens is None) == (job.checkpointing == "none") for job in jobs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_there_is_one_line() -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        gpu_plan(("step",), 1, 60.0)
    with pytest.raises(ValueError, match="choose from numerics, attention, spread, step, longest"):
        gpu_plan(("steps",), 1, 60.0)
