"""Whatever is wrong with what a run is given: one line that names it, exit code 2, and no traceback."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import prepare, train_alone

from roformer_dist.config import derive, load_config
from roformer_dist.data.errors import DataError
from roformer_dist.engine.datasets import RunData

ONE_STEP = ("train.num_steps=1", "schedule.warmup_steps=0", "parallel.sp_size=1")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("bad_input"))


def train(
    config: Path, run_dir: Path | str, *extra: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """One process and one step of a run."""
    return train_alone(config, run_dir, *ONE_STEP, *extra, **environment)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a run that was refused."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return lines[0]


@pytest.fixture
def restored(config: Path) -> Iterator[Path]:
    """The prepared folder, put back as it was after a test that damages it."""
    folder, copy = config.parent, config.parent.with_suffix(".copy")
    shutil.copytree(folder, copy)
    yield folder
    shutil.rmtree(folder)
    copy.rename(folder)


def test_a_port_in_use_is_named(config: Path, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        line = refusal(train(config, tmp_path / "run", MASTER_PORT=port, **ranks))
    assert port in line
    assert "MASTER_PORT" in line


def test_a_read_only_directory_is_named(config: Path):
    # /sys takes no new folder from anyone, not even from root.
    run_dir = "/sys/roformer_dist_run"
    assert run_dir in refusal(train(config, run_dir))


FILES = ["train.npz", "shards/train/manifest.json", "shards/train/shard-000000.idx.npy"]


def damage(file: Path, how: str) -> None:
    """Flip a bit in the middle, cut the file in half, empty it, or remove it."""
    content = file.read_bytes()
    if how == "flip":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if how == "cut" else b"")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flip", "cut", "empty", "missing"])
def test_a_damaged_file_is_named(restored: Path, name: str, how: str):
    file = restored / name
    damage(file, how)
    config = load_config(restored / "config.toml")
    with pytest.raises(DataError) as found:
        RunData(config, derive(config, 2), 0)
    # The line that train prints is this message, with its line breaks gone.
    assert (file.parent.name if how == "missing" else file.name) in str(found.value)
    assert "\n" not in str(found.value)


def test_a_damaged_plan_ends_a_launch_in_one_line(restored: Path, tmp_path: Path):
    damage(restored / "train.npz", "flip")
    assert "train.npz" in refusal(train(restored / "config.toml", tmp_path / "run"))


def test_a_checkpoint_of_another_model_is_refused(config: Path, tmp_path: Path):
    assert train(config, tmp_path / "narrow").returncode == 0
    wide = tmp_path / "wide"
    changed = ["model.hidden_size=64", "model.intermediate_size=128"]
    assert train(config, wide, *changed).returncode == 0
    shutil.rmtree(wide / "checkpoints")
    shutil.copytree(tmp_path / "narrow" / "checkpoints", wide / "checkpoints")
    line = refusal(train(config, wide, *changed))
    assert "step_000001" in line
    assert "(512, 64) in the model and (512, 32) in the checkpoint" in line


def test_a_zero_switch_that_needs_a_gpu_is_refused_on_the_cpu(config: Path, tmp_path: Path):
    switch = ["parallel.zero_stage=3", "parallel.quantized_weights=true"]
    line = refusal(train(config, tmp_path / "run", *switch, DS_ACCELERATOR="cpu"))
    assert "parallel.quantized_weights = true" in line
    assert "set it to false" in line
