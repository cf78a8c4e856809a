"""The files of a checkpoint: what a rank writes, how the parts become one manifest, how it is verified.

Pure file work: no collective, no DeepSpeed, so that all of it can run in a background thread.
``docs/checkpoint_format.md`` describes the format.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"

Kind = Literal["parameter", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MOMENTS = {"exp_avg", "exp_avg_sq"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, verified or loaded; one line: the file, the numbers, the fix."""


@dataclass(frozen=True)
class Fragment:
    """Elements ``[start, start + len(tensor))`` of one flattened parameter or of one of its moments.

    Attributes:
        name: the parameter's name in ``model.named_parameters()``.
        kind: the fp32 master value, or one of Adam's two moments.
        shape: the whole parameter's shape.
        start: the first element's index in the flattened parameter.
        tensor: 1-D fp32; may be a live view of what the optimizer updates.
        training_dtype: what the model computes this parameter in, ``"bfloat16"`` or ``"float32"``.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    start: int
    tensor: Tensor
    training_dtype: str

    @property
    def key(self) -> str:
        """The tensor's name inside its safetensors file."""
        return f"{self.kind}|{self.name}|{self.start}"


def rank_file(rank: int) -> str:
    """The safetensors file that ``rank`` writes."""
    return f"rank-{rank:05d}.safetensors"


def part_file(rank: int) -> str:
    """The partial manifest that says ``rank`` has finished its file."""
    return f"rank-{rank:05d}.json"


def write_part(directory: Path, rank: int, fragments: Iterable[Fragment]) -> None:
    """Write one rank's tensors and, only once they are on disk, its partial manifest.

    Raises:
        OSError: the file could not be written, naming it (a full disk, for example).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    fragments = list(fragments)
    path = directory / rank_file(rank)
    try:
        save_file({fragment.key: fragment.tensor for fragment in fragments}, path)
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written: {error}") from error
    fsync(path)
    parameters: dict[str, Any] = {}
    for fragment in fragments:
        entry = parameters.setdefault(
            fragment.name,
            {"shape": list(fragment.shape), "dtype": fragment.training_dtype, "fragments": {}},
        )
        location = [path.name, fragment.key, fragment.start, fragment.tensor.numel()]
        entry["fragments"].setdefault(fragment.kind, []).append(location)
    part = {
        "file": {"bytes": path.stat().st_size, "sha256": file_sha256(path)},
        "parameters": parameters,
    }
    write_atomically(directory / part_file(rank), json.dumps(part))


def merge_parts(directory: Path, world_size: int, header: dict[str, Any]) -> None:
    """Write ``manifest.json`` from every rank's partial manifest, which are then removed.

    Raises:
        CheckpointError: the ranks' fragments do not cover each parameter exactly once.
    """
    files: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    for rank in range(world_size):
        part = json.loads((directory / part_file(rank)).read_text())
        files[rank_file(rank)] = part["file"]
        for name, theirs in part["parameters"].items():
            ours = parameters.setdefault(name, {**theirs, "fragments": {}})
            for kind, locations in theirs["fragments"].items():
                ours["fragments"].setdefault(kind, []).extend(locations)
    trained = any(MOMENTS & entry["fragments"].keys() for entry in parameters.values())
    for name, entry in parameters.items():
        for locations in entry["fragments"].values():
            locations.sort(key=lambda location: location[2])
        check_coverage(directory, name, entry, KINDS if trained else KINDS[:1])
    manifest = {**header, "version": FORMAT_VERSION, "files": files, "parameters": parameters}
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=1))
    for rank in range(world_size):
        (directory / part_file(rank)).unlink()


def check_coverage(
    directory: Path, name: str, entry: dict[str, Any], kinds: tuple[Kind, ...] = KINDS
) -> None:
    """Raise CheckpointError unless the sorted fragments cover each of ``kinds`` of ``name`` exactly once."""
    numel = torch.Size(entry["shape"]).numel()
    for kind in kinds:
        covered = 0
        for file, _, start, length in entry["fragments"].get(kind, []):
            if start != covered:
                raise CheckpointError(
                    f"{directory}: {kind} of {name}: {file} starts at element {start}, expected {covered}; "
                    "a rank's fragments are missing or doubled: save again"
                )
            covered += length
        if covered != numel:
            raise CheckpointError(
                f"{directory}: {kind} of {name}: {covered} of {numel} elements; "
                "a rank's fragments are missing: save again"
            )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the complete checkpoint at ``path``.

    Raises:
        CheckpointError: it is incomplete, its manifest is damaged or of a version not known here.
    """
    try:
        text = (path / MANIFEST).read_bytes()
        expected = (path / COMPLETE).read_bytes().strip()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename}: missing; the save did not finish: use an older checkpoint"
        ) from error
    if hashlib.sha256(text).hexdigest().encode() != expected:
        raise CheckpointError(
            f"{path / MANIFEST}: its sha256 is not the one in {COMPLETE}: use an older checkpoint"
        )
    manifest = json.loads(text)
    if manifest["version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / MANIFEST}: format version {manifest['version']}, this package reads {FORMAT_VERSION}: "
            "load it with the version of roformer-dist that wrote it"
        )
    return manifest


def verify_checkpoint(path: str | os.PathLike[str]) -> None:
    """Check every file of a checkpoint against its manifest: size first, then sha256.

    Raises:
        CheckpointError: the first file found missing, short or changed.
    """
    path = Path(path)
    files = read_manifest(path)["files"]
    for name, expected in files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: missing; use an older checkpoint")
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{path / name}: {size} bytes, expected {expected['bytes']}; use an older checkpoint"
            )
    # Hashing releases the interpreter lock, so threads do run side by side.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for name, sha256 in zip(files, pool.map(file_sha256, (path / name for name in files)), strict=True):
            if sha256 != files[name]["sha256"]:
                raise CheckpointError(
                    f"{path / name}: sha256 {sha256[:12]}, expected {files[name]['sha256'][:12]}; "
                    "it was damaged after it was written: use an older checkpoint"
                )


def file_sha256(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` either holds all of it, durably, or does not exist."""
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(text)
    fsync(temporary)
    temporary.rename(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Make a file's contents, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
