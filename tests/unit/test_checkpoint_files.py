"""The checkpoint's files without DeepSpeed: what is read back, what a kill or a damaged file leaves."""

from __future__ import annotations

import hashlib
import json
import resource
import threading
from pathlib import Path

import pytest
import torch

from roformer_dist.engine import checkpoint as checkpoint_module
from roformer_dist.engine.checkpoint import (
    CheckpointReader,
    CheckpointWriter,
    latest_checkpoint,
    load_parameters,
    verify_checkpoint,
)
from roformer_dist.engine.checkpoint_files import (
    COMPLETE,
    KINDS,
    MANIFEST,
    CheckpointError,
    Fragment,
    write_part,
)

SHAPES = {"weight": (7, 11), "bias": (11,), "scale": (1,)}


def values(name: str, kind: str, step: int) -> torch.Tensor:
    numel = torch.Size(SHAPES[name]).numel()
    return torch.arange(numel, dtype=torch.float32) + 1000 * KINDS.index(kind) + 0.5 * step


def fragments(rank: int, world_size: int, step: int = 0) -> list[Fragment]:
    """Ragged shares: each rank's is one element longer than the rank's before it, where there are enough."""
    found = []
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        cuts = [
            numel * rank * (rank + 1) // (world_size * (world_size + 1)) for rank in range(world_size + 1)
        ]
        start, stop = cuts[rank], cuts[rank + 1]
        if start < stop:
            for kind in KINDS:
                tensor = values(name, kind, step)[start:stop]
                found.append(Fragment(name, kind, shape, start, tensor, "bfloat16"))
    return found


def save(directory: Path, step: int, *, world_size: int = 3, keep: int = 3, background: bool = False) -> Path:
    """A checkpoint of ``world_size`` ranks; rank 0 comes last, since it waits for the others."""
    writers = [
        CheckpointWriter(directory, rank=rank, world_size=world_size, keep=keep, timeout_s=5)
        for rank in range(world_size)
    ]
    for rank, writer in reversed(list(enumerate(writers))):
        state = {"step": step, "seed": [1, 2]}
        parts = fragments(rank, world_size, step)
        writer.save(step, parts, state, optimizer_step=step + 1, background=background)
        writer.wait()
    return directory / f"step_{step:06d}"


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_any_range_reads_back(tmp_path: Path, world_size: int) -> None:
    reader = CheckpointReader(save(tmp_path, 7, world_size=world_size))
    assert (reader.step, reader.optimizer_step, reader.state) == (7, 8, {"step": 7, "seed": [1, 2]})
    assert reader.parameters == SHAPES
    for name in SHAPES:
        for kind in KINDS:
            expected = values(name, kind, 7)
            for start in range(len(expected) + 1):
                for stop in (start, min(start + 3, len(expected)), len(expected)):
                    got = reader.read(name, kind, start, stop)
                    assert got.dtype == torch.float32
                    assert torch.equal(got, expected[start:stop])
    whole = load_parameters(reader.path)
    assert all(torch.equal(whole[n], values(n, "parameter", 7).reshape(SHAPES[n])) for n in SHAPES)


def test_directory_holds_nothing_else_and_nothing_pickled(tmp_path: Path) -> None:
    path = save(tmp_path, 500, world_size=2)
    names = ["COMPLETE", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    assert sorted(file.name for file in path.iterdir()) == names
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_000500"]


def test_background_writes_the_same_bytes(tmp_path: Path) -> None:
    there = save(tmp_path / "foreground", 3)
    here = save(tmp_path / "background", 3, background=True)
    assert {file.name: file.read_bytes() for file in there.iterdir()} == {
        file.name: file.read_bytes() for file in here.iterdir()
    }


def test_what_changes_after_save_returns_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is held until the live tensor and the state have changed: the snapshot must be written."""
    changed = threading.Event()

    def late(*args: object) -> None:
        assert changed.wait(10)
        write_part(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(checkpoint_module, "write_part", late)
    writer = CheckpointWriter(tmp_path, rank=0, world_size=1, keep=1)
    parts, state = fragments(0, 1), {"tokens_seen": 5}
    writer.save(1, parts, state, optimizer_step=1)
    for fragment in parts:
        fragment.tensor.fill_(-1)
    state["tokens_seen"] = 6
    changed.set()
    writer.wait()
    reader = CheckpointReader(tmp_path / "step_000001")
    assert reader.state == {"tokens_seen": 5}
    assert torch.equal(reader.read("weight", "exp_avg", 0, 77), values("weight", "exp_avg", 0))


@pytest.mark.parametrize("killed_in", ["write_part", "merge_parts", "fsync", "write_atomically"])
def test_killed_between_files_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    class Killed(BaseException): ...

    def die(*_: object) -> None:
        raise Killed

    before = save(tmp_path, 1, world_size=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, killed_in, die)
        with pytest.raises(Killed):
            save(tmp_path, 2, world_size=1)
    assert not list(tmp_path.glob(f"step_000002*/{COMPLETE}"))
    assert latest_checkpoint(tmp_path, report=pytest.fail) == before
    # The next run comes to step 2 again: it replaces the leftovers.
    assert latest_checkpoint(tmp_path, report=pytest.fail) == before
    after = save(tmp_path, 2, world_size=1)
    assert latest_checkpoint(tmp_path, report=pytest.fail) == after
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def test_stale_parts_of_a_larger_world_are_not_merged(tmp_path: Path) -> None:
    stale = tmp_path / "step_000004.unfinished"
    stale.mkdir(parents=True)
    for rank in (1, 2):
        write_part(stale, rank, fragments(rank, 3, step=99))
    path = save(tmp_path, 4, world_size=2)
    verify_checkpoint(path)
    assert sorted(file.name for file in path.glob("rank-*")) == [
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    assert torch.equal(load_parameters(path)["bias"], values("bias", "parameter", 4))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip_a_bit(path / "rank-00001.safetensors"), "rank-00001.safetensors: sha256"),
        (lambda path: (path / "rank-00002.safetensors").write_bytes(b"short"), "00002.safetensors: 5 bytes"),
        (lambda path: (path / "rank-00000.safetensors").unlink(), "rank-00000.safetensors: missing"),
        (lambda path: flip_a_bit(path / MANIFEST), "manifest.json: its sha256"),
        (lambda path: (path / MANIFEST).unlink(), "manifest.json: missing"),
    ],
    ids=["flipped bit", "truncated", "deleted", "manifest flipped", "manifest deleted"],
)
def test_damaged_is_reported_and_the_one_before_used(tmp_path: Path, damage, message: str) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    damage(newest)
    reports: list[str] = []
    assert latest_checkpoint(tmp_path, report=reports.append) == before
    assert len(reports) == 1
    assert message in reports[0]
    with pytest.raises(CheckpointError, match="use an older checkpoint"):
        verify_checkpoint(newest)


def test_incomplete_is_not_a_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path, report=pytest.fail) is None
    path = save(tmp_path, 1)
    (path / COMPLETE).unlink()
    assert latest_checkpoint(tmp_path, report=pytest.fail) is None
    with pytest.raises(CheckpointError, match="did not finish"):
        CheckpointReader(path)


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (900_000, 1_000_000, 2_000_000):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1000000", "step_2000000"]


def test_keeps_what_was_just_written_behind_a_damaged_later_one(tmp_path: Path) -> None:
    later = save(tmp_path, 500, keep=1)
    flip_a_bit(later / "rank-00000.safetensors")
    written = save(tmp_path, 450, keep=1)
    reports: list[str] = []
    assert latest_checkpoint(tmp_path, report=reports.append) == written
    assert "step_000500 is damaged" in reports[0]


def test_a_missing_rank_is_one_clear_error(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, rank=0, world_size=3, keep=1, timeout_s=0.1)
    writer.save(5, fragments(0, 3), {}, optimizer_step=5)
    with pytest.raises(CheckpointError, match=r"rank-00001\.json: not there after 0\.1 s \(2 of 3 ranks"):
        writer.wait()
    writer.wait()  # said once
    assert latest_checkpoint(tmp_path, report=pytest.fail) is None


@pytest.mark.parametrize(("change", "message"), [("drop", "61 of 77"), ("double", "starts at element 0")])
def test_fragments_that_do_not_cover_are_refused(tmp_path: Path, change: str, message: str) -> None:
    parts = fragments(0, 1)
    moment = next(part for part in parts if part.kind == "exp_avg")
    parts.remove(moment)
    start, tensor = (0, moment.tensor[:61]) if change == "drop" else (1, moment.tensor[1:])
    parts.append(Fragment(moment.name, moment.kind, moment.shape, start, tensor, "float32"))
    writer = CheckpointWriter(tmp_path, rank=0, world_size=1, keep=1)
    message = message if change == "drop" else "starts at element 1, expected 0"
    with pytest.raises(CheckpointError, match=message):
        writer.save(1, parts, {}, optimizer_step=1, background=False)
    assert latest_checkpoint(tmp_path, report=pytest.fail) is None


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    text = json.dumps({**manifest, "version": 2})
    (path / MANIFEST).write_text(text)
    (path / COMPLETE).write_text(hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(CheckpointError, match="format version 2, this package reads 1"):
        CheckpointReader(path)


def test_reader_refuses_what_it_does_not_hold(tmp_path: Path) -> None:
    reader = CheckpointReader(save(tmp_path, 1))
    with pytest.raises(CheckpointError, match="no parameter head"):
        reader.read("head", "parameter", 0, 1)
    with pytest.raises(CheckpointError, match=r"bias has 11 elements, asked for \[3, 12\)"):
        reader.read("bias", "parameter", 3, 12)


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """A limit on file sizes stands in for a disk that runs full after a kilobyte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OSError, match=r"rank-00000\.safetensors"):
            write_part(tmp_path, 0, fragments(0, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_state_must_be_json(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, rank=0, world_size=1, keep=1)
    with pytest.raises(TypeError, match="JSON"):
        writer.save(1, fragments(0, 1), {"rng": torch.zeros(2)}, optimizer_step=1)
    with pytest.raises(CheckpointError, match="keep=0"):
        CheckpointWriter(tmp_path, rank=0, world_size=1, keep=0)


def test_rank_0_does_not_wait_for_a_rank_that_failed(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, rank=0, world_size=2, keep=1)
    writer.save(3, fragments(0, 2), {}, optimizer_step=3)
    writer.abandon()  # would take half an hour if it waited
    with pytest.raises(CheckpointError, match="a rank failed"):
        writer.wait()
    assert latest_checkpoint(tmp_path, report=print) is None


def test_a_damaged_complete_mark_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / COMPLETE).write_bytes(b"\xff\xfe")
    assert latest_checkpoint(tmp_path, report=lambda _: None) == tmp_path / "step_000001"
