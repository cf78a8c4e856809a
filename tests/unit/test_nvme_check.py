"""Offload to NVMe: what is refused before anything is compiled, and what is said before it is."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from roformer_dist.config.parallel import ParallelConfig
from roformer_dist.engine.nvme import BUFFERS, PARAMETER_BUFFERS, SUB_GROUP, check_nvme, swap_folder
from roformer_dist.engine.zero import check_machine, describe, zero_optimization

OPERATOR = "deepspeed.ops.op_builder.AsyncIOBuilder"


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with a compiler and libaio on which the operator is not compiled; compiling it does nothing."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(f"{OPERATOR}.is_compatible", lambda self, verbose=False: True)
    monkeypatch.setattr(f"{OPERATOR}.load", lambda self, verbose=False: None)
    monkeypatch.setattr("deepspeed.git_version_info.installed_ops", {})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("LOCAL_RANK", "0")


def _nvme(path: Path) -> ParallelConfig:
    return ParallelConfig(zero_stage=3, offload_optimizer="nvme", nvme_path=str(path))


def test_the_first_start_says_that_it_compiles(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_machine(_nvme(tmp_path), "cpu", 1, 1)
    assert "compiling DeepSpeed's async_io operator into" in capfd.readouterr().err
    folder = next((tmp_path / "extensions").rglob("async_io"))
    (folder / "async_io.so").touch()
    check_machine(_nvme(tmp_path), "cpu", 1, 1)
    assert capfd.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["extensions"], "the probe of the directory is gone"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("shutil.which", lambda name: None if name == "c++" else name, "needs a C.. compiler, .* install g"),
        ("shutil.which", lambda name: None if name == "ninja" else name, "needs ninja .*; activate the env"),
        (
            f"{OPERATOR}.is_compatible",
            lambda self, verbose=False: False,
            'needs libaio and its header, which is not there; apt-get install libaio-dev, or offload to "cpu"',
        ),
    ],
)
def test_what_is_missing_is_named_with_what_installs_it(
    name: str, value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name, value)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=message) as caught:
        check_nvme(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_operator_that_does_not_compile_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Any, verbose: bool = False) -> None:
        raise RuntimeError("Error building extension 'async_io': [1/9] c++ -MMD\nfatal error: no disk")

    monkeypatch.setattr(f"{OPERATOR}.load", load)
    with pytest.raises(
        ValueError, match=r"cannot be compiled or loaded: Error building.*or offload to"
    ) as caught:
        check_nvme(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_directory_that_cannot_take_swap_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"nvme_path = '.*none' is no directory on this node; make it"):
        check_nvme(str(tmp_path / "none"))

    whole = os.open

    def without_direct(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return whole(path, flags, *mode)

    monkeypatch.setattr(os, "open", without_direct)
    with pytest.raises(ValueError, match=r"cannot be written around the page cache \(Invalid argument\)"):
        check_nvme(str(tmp_path))


def test_every_engine_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [swap_folder(_nvme(tmp_path)) for _ in range(2)]
    assert len({folder.name for folder in folders if folder is not None}) == 2
    folders.clear()
    assert list(tmp_path.iterdir()) == []
    assert swap_folder(ParallelConfig(zero_stage=3, offload_optimizer="cpu")) is None


def test_deepspeed_is_told_and_reads_where_and_how_much(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    told = zero_optimization(_nvme(tmp_path))
    assert told == {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": BUFFERS},
        "sub_group_size": SUB_GROUP,
    }
    read = DeepSpeedZeroConfig(**told)
    assert read.offload_optimizer is not None
    assert (read.offload_optimizer.device, read.offload_optimizer.nvme_path) == ("nvme", tmp_path)
    assert read.sub_group_size == SUB_GROUP
    assert describe(_nvme(tmp_path)) == f"ZeRO-3 (optimizer in {tmp_path})"


def test_deepspeed_is_told_and_reads_how_parameters_are_kept(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    parallel = ParallelConfig(zero_stage=3, offload_parameters="nvme", nvme_path=str(tmp_path))
    told = zero_optimization(parallel, largest_share=1000)
    kept = {"device": "nvme", "nvme_path": str(tmp_path), "max_in_cpu": 0}
    assert told == {
        "stage": 3,
        "sub_group_size": SUB_GROUP,
        "offload_param": {**kept, "buffer_count": PARAMETER_BUFFERS, "buffer_size": 1000},
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
    }
    read = DeepSpeedZeroConfig(**told)
    assert read.offload_param is not None
    assert (read.offload_param.device, read.offload_param.nvme_path) == ("nvme", tmp_path)
    assert (read.prefetch_bucket_size, read.max_reuse_distance) == (0, 0)
    assert describe(parallel) == f"ZeRO-3 (parameters in {tmp_path})"
