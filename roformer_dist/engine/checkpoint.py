"""Writing and reading mesh-free checkpoints: any world size and ZeRO stage loads what any other wrote.

writer = CheckpointWriter(run / "checkpoints", rank=rank, world_size=world_size, keep=3)
writer.save(step, engine_fragments(engine), state, optimizer_step=optimizer_step(engine))

path = latest_checkpoint(run / "checkpoints", report=print)
load_engine(engine, CheckpointReader(path))
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roformer_dist.engine.checkpoint_files import (
    COMPLETE,
    MANIFEST,
    CheckpointError,
    Fragment,
    Kind,
    fsync,
    merge_parts,
    part_file,
    read_manifest,
    verify_checkpoint,
    write_atomically,
    write_part,
)

UNFINISHED = ".unfinished"
POLL_S = 0.05


class CheckpointWriter:
    """Writes ``directory/step_000500``; each rank its own file, rank 0 the manifest.

    Construct it on every rank before the run's first collective: rank 0 removes what a killed run left
    unfinished, and no rank can then be writing already. The ranks meet through the file system only, so
    ``directory`` must be on one that all of them share.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        rank: int,
        world_size: int,
        keep: int,
        timeout_s: float = 1800.0,
    ) -> None:
        """
        Args:
            directory: holds the checkpoints of one run; created if missing.
            keep: how many complete checkpoints to keep, at least 1; older ones go once a newer is complete.
            timeout_s: how long rank 0 waits for the other ranks' files.
        """
        if keep < 1:
            raise CheckpointError(f"keep={keep}: at least one checkpoint must be kept")
        self.directory = Path(directory)
        self.rank = rank
        self.world_size = world_size
        self.keep = keep
        self.timeout_s = timeout_s
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._abandoned = threading.Event()
        self.directory.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            for leftover in self.directory.glob(f"*{UNFINISHED}"):
                shutil.rmtree(leftover)

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        state: dict[str, Any],
        *,
        optimizer_step: int,
        background: bool = True,
    ) -> None:
        """Copy the fragments to host memory, then write them; every rank calls it with its own fragments.

        Costs a host copy of this rank's fragments (12 bytes an element of its share) until it is written.
        Waits for the previous save first, so that there is never more than one copy.

        Args:
            step: the trainer's step, which names the directory; an existing one of that step is replaced.
            state: what else a resume needs, as JSON; rank 0's is kept.
            optimizer_step: Adam's own count.
            background: return after the copy and write in a thread; ``wait`` reports its errors.

        Raises:
            CheckpointError, OSError: what this save, or the previous one in the background, ran into.
        """
        self.wait()
        snapshot = [
            replace(fragment, tensor=fragment.tensor.to("cpu", torch.float32, copy=True))
            for fragment in fragments
        ]
        header = {
            "step": step,
            "optimizer_step": optimizer_step,
            "world_size": self.world_size,
            "state": json.loads(json.dumps(state)),  # a copy, and an error now rather than in the thread
        }
        if not background:
            self._write(step, snapshot, header)
            return
        self._thread = threading.Thread(
            target=self._write_and_keep_error, args=(step, snapshot, header), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save in the background, if any, and raise what it raised.

        On rank 0 the checkpoint is then complete; on another rank that rank's file is written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def error(self) -> BaseException | None:
        """What the save in the background ran into, as soon as it has; ``wait`` raises and clears it."""
        return self._error

    def abandon(self) -> None:
        """Stop waiting for the other ranks' files: one of them failed, and the save never gets complete."""
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join()

    def _write_and_keep_error(self, step: int, snapshot: list[Fragment], header: dict[str, Any]) -> None:
        try:
            self._write(step, snapshot, header)
        except BaseException as error:
            self._error = error

    def _write(self, step: int, snapshot: list[Fragment], header: dict[str, Any]) -> None:
        final = self.directory / f"step_{step:06d}"
        unfinished = final.with_name(final.name + UNFINISHED)
        unfinished.mkdir(exist_ok=True)
        write_part(unfinished, self.rank, snapshot)
        snapshot.clear()  # the host copy is not needed while rank 0 waits for the others
        if self.rank == 0:
            self._wait_for_parts(unfinished)
            merge_parts(unfinished, self.world_size, header)
            publish(unfinished, final)
            self._remove_old(step)

    def _wait_for_parts(self, unfinished: Path) -> None:
        deadline = time.monotonic() + self.timeout_s
        missing = [unfinished / part_file(rank) for rank in range(self.world_size)]
        while missing := [part for part in missing if not part.exists()]:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{missing[0]}: not there after {self.timeout_s:g} s ({len(missing)} of "
                    f"{self.world_size} ranks missing); did a rank stop, or is the directory not shared "
                    "by all nodes?"
                )
            if self._abandoned.wait(POLL_S):
                raise CheckpointError(f"{missing[0]}: not written, because a rank failed")

    def _remove_old(self, step: int) -> None:
        # A checkpoint of a later step was left by a run that this one went back behind: not ours to count.
        kept = [path for path in complete_checkpoints(self.directory) if step_of(path) <= step]
        for path in kept[: -self.keep]:
            remove(path)


def publish(unfinished: Path, final: Path) -> None:
    """Give a finished directory its name, and only then mark it complete."""
    if final.exists():
        remove(final)  # damaged or never completed, else the run would not have come to this step again
    unfinished.rename(final)
    fsync(final.parent)
    write_atomically(final / COMPLETE, hashlib.sha256((final / MANIFEST).read_bytes()).hexdigest())


def remove(path: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves nothing that looks like one."""
    doomed = path.with_name(f"{path.name}.old{UNFINISHED}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def step_of(path: Path) -> int:
    """The step in a checkpoint directory's name, -1 if it is not one."""
    match = re.fullmatch(r"step_(\d{6,})", path.name)
    return int(match[1]) if match else -1


def complete_checkpoints(directory: Path) -> list[Path]:
    """The directories that carry COMPLETE, oldest step first; their files are not looked at."""
    found = [path for path in directory.glob("step_*") if step_of(path) >= 0 and (path / COMPLETE).exists()]
    return sorted(found, key=step_of)


def latest_checkpoint(directory: str | os.PathLike[str], *, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files all verify (size and sha256), ``None`` if there is none.

    A damaged one is reported and the one before it tried. Reads every byte of what it returns: let one rank
    ask and tell the others.
    """
    for path in reversed(complete_checkpoints(Path(directory))):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            report(f"{path.name} is damaged and is not used: {error}")
        else:
            return path
    return None


class CheckpointReader:
    """Reads ranges of a checkpoint's parameters and moments, and only those ranges.

    Attributes:
        path: the checkpoint's directory.
        step: the trainer's step it was written at.
        optimizer_step: Adam's count.
        state: the trainer's dictionary.
        parameters: shape by parameter name.
        dtypes: what each parameter was trained in, by name: ``"bfloat16"`` or ``"float32"``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the manifest; the tensors' files are opened when asked for, and not verified again.

        Raises:
            CheckpointError: incomplete, damaged manifest, or a format version not known here.
        """
        self.path = Path(path)
        manifest = read_manifest(self.path)
        self.step: int = manifest["step"]
        self.optimizer_step: int = manifest["optimizer_step"]
        self.state: dict[str, Any] = manifest["state"]
        self._entries: dict[str, Any] = manifest["parameters"]
        self.parameters = {name: tuple(entry["shape"]) for name, entry in self._entries.items()}
        self.dtypes: dict[str, str] = {name: entry["dtype"] for name, entry in self._entries.items()}
        self._files: dict[str, Any] = {}

    def read(self, name: str, kind: Kind, start: int, stop: int) -> Tensor:
        """fp32 elements ``[start, stop)`` of the flattened parameter, or of one of its moments.

        Raises:
            CheckpointError: no such parameter, the range is outside of it, or a file cannot be read.
        """
        if name not in self.parameters:
            raise CheckpointError(
                f"{self.path}: has no parameter {name}: it is a checkpoint of another model"
            )
        numel = torch.Size(self.parameters[name]).numel()
        if not 0 <= start <= stop <= numel:
            raise CheckpointError(f"{self.path}: {name} has {numel} elements, asked for [{start}, {stop})")
        if kind not in self._entries[name]["fragments"]:
            raise CheckpointError(
                f"{self.path}: holds parameters only, no {kind}: a run starts from it with checkpoint.init_from"
            )
        pieces = []
        for file, key, first, length in self._entries[name]["fragments"][kind]:
            low, high = max(start, first), min(stop, first + length)
            if low < high:
                pieces.append(self._slice(file, key, low - first, high - first))
        return pieces[0] if len(pieces) == 1 else torch.cat([torch.empty(0), *pieces])

    def _slice(self, file: str, key: str, low: int, high: int) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            if file not in self._files:
                self._files[file] = safe_open(self.path / file, framework="pt")
            return self._files[file].get_slice(key)[low:high]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / file}: {error}; use an older checkpoint") from error


def load_parameters(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Every parameter, whole and in fp32, by name: for one process that evaluates or exports.

    Raises:
        CheckpointError: the checkpoint is incomplete or cannot be read.
    """
    reader = CheckpointReader(path)
    return {
        name: reader.read(name, "parameter", 0, torch.Size(shape).numel()).reshape(shape)
        for name, shape in reader.parameters.items()
    }
