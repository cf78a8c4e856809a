"""The choice of arithmetic, and DeepSpeed's dictionary of it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

import roformer_dist
from roformer_dist.config import derive, parse_config
from roformer_dist.engine.deepspeed_config import check_precision, deepspeed_config
from roformer_dist.engine.precision import CPU_BF16_UNITS, choose_precision, has_bf16_units

RECIPE = Path(roformer_dist.__file__).parent.parent / "configs" / "quickstart.toml"


@pytest.mark.parametrize(
    ("wanted", "everywhere", "precision", "reason"),
    [
        ("auto", True, "bf16", "bf16 with fp32 master weights: FOUND"),
        ("auto", False, "fp32", "fp32: FOUND, or another process's device has none"),
        # What was asked for is done, with the finding beside it.
        ("bf16", True, "bf16", "bf16 with fp32 master weights: asked for; FOUND"),
        ("bf16", False, "bf16", "bf16 with fp32 master weights: asked for; FOUND"),
        ("fp32", True, "fp32", "fp32: asked for"),
        ("fp32", False, "fp32", "fp32: asked for"),
    ],
)
def test_the_choice_and_its_reason(wanted: str, everywhere: bool, precision: str, reason: str) -> None:
    assert choose_precision(wanted, everywhere=everywhere, finding="FOUND") == (precision, reason)


def test_the_finding_on_this_cpu_is_what_proc_cpuinfo_says() -> None:
    found, words = has_bf16_units(torch.device("cpu"))
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    flags = {
        flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()
    }
    present = [unit for unit in CPU_BF16_UNITS if unit in flags]
    assert found == bool(present)
    assert all(unit in words for unit in present)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_only_bf16_without_zero_is_refused(stage: int, precision: str) -> None:
    if (stage, precision) == (0, "bf16"):
        with pytest.raises(
            ValueError, match=r'parallel.zero_stage = 0 with bf16.*zero_stage = 1.*precision = "fp32"'
        ):
            check_precision(stage, precision)
    else:
        check_precision(stage, precision)


@pytest.mark.parametrize(("precision", "enabled"), [("bf16", True), ("fp32", False)])
def test_deepspeed_counts_processes_and_keeps_gradients_in_fp32(precision: str, enabled: bool) -> None:
    values = tomllib.loads(RECIPE.read_text())
    values["train"] |= {"seq_len": 512, "tokens_per_step": 8192, "micro_batch_size": 2}
    values["parallel"] = {"sp_size": 2, "zero_stage": 3}
    config = parse_config(values, source="test")
    shape = derive(config, 4)  # 16 rows, two replicas of 2 rows: 4 micro-batches
    found = deepspeed_config(config, shape, precision)
    assert found["bf16"] == {"enabled": enabled}
    assert found["zero_optimization"]["stage"] == 3
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (2, 4)
    # Every process is a data-parallel rank to DeepSpeed: 2 x 4 x 4.
    assert found["train_batch_size"] == 32
    assert found["data_types"]["grad_accum_dtype"] == found["communication_data_type"] == "fp32"
    assert found["gradient_clipping"] == config.optimizer.max_grad_norm
