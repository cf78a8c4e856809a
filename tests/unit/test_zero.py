"""ZeRO's switches: what is refused, in one line, and the exact dictionary that DeepSpeed is given."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from config_example import BASE

from roformer_dist.config import ConfigError, derive, parse_config
from roformer_dist.config.parallel import ParallelConfig
from roformer_dist.engine.deepspeed_config import deepspeed_config
from roformer_dist.engine.zero import check_machine, check_partitions, describe, zero_optimization
from roformer_dist.parity.command import run_parity
from roformer_dist.parity.shrink import shrink


def config_with(**parallel: Any):
    return parse_config(tomllib.loads(BASE) | {"parallel": parallel}, source="run.toml")


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            {"zero_stage": 0, "offload_optimizer": "cpu"},
            'parallel: offload_optimizer = "cpu" needs sharded optimizer states, and zero_stage = 0 has none; set '
            'zero_stage to 1, 2 or 3, or offload_optimizer = "none"',
        ),
        *(
            (
                {"zero_stage": stage, "offload_optimizer": "nvme", "nvme_path": "/disk"},
                'parallel: offload_optimizer = "nvme" is for zero_stage = 3, and DeepSpeed ignores the disk at '
                f'zero_stage = {stage}; set zero_stage = 3 or offload_optimizer = "cpu"',
            )
            for stage in (0, 1, 2)
        ),
        *(
            (
                {"zero_stage": 3, name: "nvme"},
                f'parallel: {name} = "nvme" needs nvme_path, a directory on a local disk; set it, or {name} = "cpu"',
            )
            for name in ("offload_optimizer", "offload_parameters")
        ),
        (
            {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu", "nvme_path": "/disk"},
            'parallel: nvme_path = "/disk" is read with offload_optimizer or offload_parameters = "nvme" alone; set',
        ),
        (
            {"zero_stage": 3, "offload_parameters": "nvme", "nvme_path": "/disk", "hpz_partition_size": 2},
            'parallel: offload_parameters = "nvme" takes the parameters out of memory, and hpz_partition_size = 2 '
            "keeps a second copy there; set hpz_partition_size = 1 or",
        ),
        (
            {"zero_stage": 2, "offload_parameters": "nvme", "nvme_path": "/disk"},
            'parallel: offload_parameters = "nvme" is for sharded parameters, and zero_stage = 2 has them whole; set',
        ),
        *(
            (
                {"zero_stage": stage, key: value},
                f"parallel: {key} = {shown} is for sharded parameters, and zero_stage = {stage} has them whole; "
                f"set zero_stage = 3 or {key} = {off}",
            )
            for stage, key, value, shown, off in [
                (2, "offload_parameters", "cpu", '"cpu"', '"none"'),
                (1, "hpz_partition_size", 2, "2", "1"),
                (2, "quantized_weights", True, "true", "false"),
                (0, "quantized_gradients", True, "true", "false"),
            ]
        ),
        (
            {"offload_optimizer": "gpu"},
            "parallel.offload_optimizer = 'gpu': Input should be",
        ),
        ({"hpz_partition_size": 0}, "parallel.hpz_partition_size = 0: Input should be greater than 0"),
    ],
)
def test_a_switch_that_the_stage_would_ignore_is_refused(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_with(**parallel)
    assert str(caught.value).startswith(f"run.toml: {message}")
    assert "\n" not in str(caught.value)


def test_hpz_must_divide_the_processes() -> None:
    config = config_with(zero_stage=3, hpz_partition_size=4)
    with pytest.raises(ValueError, match="hpz_partition_size = 4 does not divide the 6 processes started"):
        derive(config, 6)


SHARDED: dict[str, Any] = {"zero_stage": 3}
EVERYTHING = ParallelConfig(
    zero_stage=3,
    offload_optimizer="cpu",
    offload_parameters="cpu",
    hpz_partition_size=8,
    quantized_weights=True,
    quantized_gradients=True,
)


@pytest.mark.parametrize(
    ("parallel", "machine", "message"),
    [
        (
            {"hpz_partition_size": 4},
            ("cuda", 8, 2),
            r"hpz_partition_size = 4 does not divide the 2 processes of this node.*take 2 or a divisor of it",
        ),
        (
            {"quantized_weights": True},
            ("cpu", 2, 2),
            r"quantized_weights = true: DeepSpeed quantizes in CUDA kernels.*on the CPU; set it to false here",
        ),
        ({"quantized_gradients": True}, ("cpu", 2, 2), r"quantized_gradients = true: .*set it to false here"),
        (
            {"quantized_gradients": True},
            ("cuda", 8, 8),
            r"all 8 processes are on one, .*start on several nodes",
        ),
        ({"quantized_gradients": True}, ("cuda", 8, 4), r"4 of 8 processes share a node of 8 GPUs: start 8"),
    ],
)
def test_a_switch_that_this_machine_cannot_honour_is_refused(
    parallel: dict[str, Any], machine: tuple[str, int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _toolkit(monkeypatch, "/usr/local/cuda")
    with pytest.raises(ValueError, match=message) as caught:
        check_machine(ParallelConfig(**SHARDED, **parallel), *machine)
    assert "\n" not in str(caught.value)


def test_quantization_needs_the_cuda_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    _toolkit(monkeypatch, None)
    with pytest.raises(ValueError, match=r"needs nvcc; install the CUDA toolkit .* or set it to false"):
        check_machine(ParallelConfig(**SHARDED, quantized_weights=True), "cuda", 8, 8)


def _toolkit(monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
    """A node of eight GPUs, with or without a CUDA toolkit."""
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", home)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def test_what_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _toolkit(monkeypatch, "/usr/local/cuda")
    everything = ParallelConfig(
        **SHARDED,
        hpz_partition_size=8,
        quantized_weights=True,
        quantized_gradients=True,
        offload_optimizer="cpu",
    )
    check_machine(everything, "cuda", 16, 8)
    check_machine(ParallelConfig(**SHARDED, hpz_partition_size=2, offload_parameters="cpu"), "cpu", 4, 2)


def test_shares_that_eight_does_not_divide_cannot_be_quantized() -> None:
    check_partitions({"up": 4096 * 14336, "norm": 4096}, 8)
    with pytest.raises(ValueError, match=r"each of 8 processes has 13 of the 100 elements of norm; change"):
        check_partitions({"up": 4096 * 14336, "norm": 100}, 8)


def test_deepspeed_is_told_exactly_what_is_set() -> None:
    assert zero_optimization(ParallelConfig(zero_stage=2)) == {"stage": 2}
    assert zero_optimization(ParallelConfig(zero_stage=1, offload_optimizer="cpu")) == {
        "stage": 1,
        "offload_optimizer": {"device": "cpu"},
    }
    assert zero_optimization(EVERYTHING) == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "zero_hpz_partition_size": 8,
        "zero_quantized_weights": True,
        "zero_quantized_gradients": True,
    }


def test_deepspeed_reads_what_it_is_told() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    read = DeepSpeedZeroConfig(**zero_optimization(EVERYTHING))
    assert read.offload_optimizer is not None
    assert read.offload_param is not None
    assert (read.stage, read.offload_optimizer.device, read.offload_param.device) == (3, "cpu", "cpu")
    assert (read.zero_hpz_partition_size, read.zero_quantized_weights) == (8, True)
    assert read.zero_quantized_gradients is True


def test_the_start_says_what_zero_does() -> None:
    assert describe(ParallelConfig(zero_stage=2)) == "ZeRO-2"
    assert describe(EVERYTHING) == (
        "ZeRO-3 (optimizer and parameters in host memory, hpZ over 8, weights and gradients quantized)"
    )
    assert (
        describe(ParallelConfig(zero_stage=1, offload_optimizer="cpu")) == "ZeRO-1 (optimizer in host memory)"
    )


@pytest.mark.parametrize(("quantized", "dtype"), [(False, "fp32"), (True, "fp16")])
def test_what_gradients_travel_in(quantized: bool, dtype: str) -> None:
    # DeepSpeed's quantization kernels take the address of their input for that of 16-bit floats.
    config = config_with(zero_stage=3, quantized_gradients=quantized)
    found = deepspeed_config(config, derive(config, 1), "bf16")
    assert found["communication_data_type"] == dtype
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert found["zero_force_ds_cpu_optimizer"] is False, "torch's AdamW steps what is offloaded"


def test_the_preflight_needs_no_disk() -> None:
    config = config_with(zero_stage=3, offload_optimizer="nvme", offload_parameters="nvme", nvme_path="/disk")
    small = shrink(config, dp_size=1).parallel
    assert (small.offload_optimizer, small.offload_parameters, small.nvme_path) == ("cpu", "cpu", None)


@pytest.fixture
def four_share_weights(tmp_path: Path) -> Path:
    """A configuration's file whose weights are copied in every four processes."""
    file = tmp_path / "run.toml"
    parallel = {"zero_stage": 3, "hpz_partition_size": 4}
    file.write_text(tomli_w.dumps(tomllib.loads(BASE) | {"parallel": parallel}))
    return file


def test_parity_on_processes_that_hpz_does_not_divide_is_refused(four_share_weights: Path) -> None:
    with pytest.raises(ValueError, match=r"--processes 2 is not a multiple of .*hpz_partition_size = 4"):
        run_parity(four_share_weights, processes=2)


def test_parity_in_threads_does_without_hpz(four_share_weights: Path) -> None:
    assert run_parity(four_share_weights, as_json=True)
