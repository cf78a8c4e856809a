"""Checkpoints of parameters alone, and runs that start from the parameters of another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from roformer_dist.config import Config
from roformer_dist.engine.agreement import together
from roformer_dist.engine.checkpoint import UNFINISHED, CheckpointReader, latest_checkpoint, publish
from roformer_dist.engine.checkpoint_files import (
    MANIFEST,
    CheckpointError,
    Fragment,
    merge_parts,
    verify_checkpoint,
    write_part,
)
from roformer_dist.engine.engine import Engine
from roformer_dist.engine.fragments import load_parameters_into
from roformer_dist.parallel.comm import Comm

# What may differ between a checkpoint's model and the run that starts from it: training's own settings, and the
# frequencies, which is how contexts are extended.
FREE = {"hidden_dropout", "attention_dropout", "init_std", "rope.theta", "rope.scaling"}


def write_parameters(directory: Path, parts: Iterable[Iterable[Fragment]], state: dict[str, Any]) -> Path:
    """Write ``directory/step_000000`` with parameters alone; a run starts from it with ``checkpoint.init_from``.

    Args:
        parts: fragments file by file; one file's are in memory at a time.
        state: JSON, with the configuration under ``config``.
    """
    unfinished = directory / f"step_000000{UNFINISHED}"
    unfinished.mkdir(parents=True)
    files = 0
    for fragments in parts:
        write_part(unfinished, files, fragments)
        files += 1
    merge_parts(unfinished, files, {"step": 0, "optimizer_step": 0, "world_size": files, "state": state})
    final = directory / "step_000000"
    publish(unfinished, final)
    return final


def find_checkpoint(path: Path, *, report: Callable[[str], None]) -> Path:
    """``path`` itself, or the newest checkpoint of the run directory that it is; verified.

    Raises:
        ValueError: there is none.
    """
    if (path / MANIFEST).is_file():
        verify_checkpoint(path)
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; give a run's directory or one of its checkpoints")
    found = latest_checkpoint(path / "checkpoints", report=report)
    if found is None:
        raise ValueError(
            f"{path}: holds no complete checkpoint; give a run's directory or one of its checkpoints"
        )
    return found


def start_from(config: Config, engine: Engine, world: Comm) -> str | None:
    """Load ``checkpoint.init_from`` into a new run's engine; rank 0 verifies, all load.

    Returns:
        What was loaded, in a line for the user; None where the key is not set.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or it is of another model.
    """
    if config.checkpoint.init_from is None:
        return None
    path = find_together(Path(config.checkpoint.init_from), world, engine.device)
    reader = together(lambda: CheckpointReader(path), world, engine.device)
    changed = together(lambda: check_same_model(reader, config), world, engine.device)
    load_parameters_into(engine.deepspeed, reader)
    notes = "".join(f"; {key}: {old} there, {new} here" for key, old, new in changed)
    return f"parameters from {path}{notes}"


def find_together(
    source: Path,
    world: Comm,
    device: torch.device,
    *,
    report: Callable[[str], None] | None = None,
) -> Path:
    """``find_checkpoint`` for all ranks: the first looks and verifies, and all get the one that it found."""

    def verified_step() -> int:
        if world.rank:
            return 0
        say = report or partial(print, flush=True)
        return CheckpointReader(find_checkpoint(source, report=say)).step

    step = together(verified_step, world, device)
    step = int(world.all_sum(torch.tensor([step], dtype=torch.int64, device=device)))
    return source if (source / MANIFEST).is_file() else source / "checkpoints" / f"step_{step:06d}"


def check_same_model(reader: CheckpointReader, config: Config) -> list[tuple[str, object, object]]:
    """Keys of the model that differ and may, as (key, value there, value here).

    Raises:
        CheckpointError: one that may not differ, by name.
    """
    there, here = reader.state["config"], config.model_dump(mode="json")
    old, new = (_flat(values["model"]) for values in (there, here))
    old["objective.kind"], new["objective.kind"] = there["objective"]["kind"], here["objective"]["kind"]
    changed = []
    for key in new:
        # A key that the checkpoint's writer did not know yet had no effect then, which is its default.
        if key not in old or old[key] == new[key]:
            continue
        if key not in FREE:
            name = key if key.startswith("objective.") else f"model.{key}"
            raise CheckpointError(
                f"checkpoint.init_from = {str(reader.path)!r}: {name} is {old[key]!r} there and {new[key]!r} here; "
                "take the model section that came with it"
            )
        changed.append((f"model.{key}", old[key], new[key]))
    return changed


def _flat(model: dict[str, Any]) -> dict[str, Any]:
    """The rope section's keys beside the others; absent sizes as what they default to."""
    flat = {key: value for key, value in model.items() if key != "rope"}
    flat |= {f"rope.{key}": value for key, value in model["rope"].items()}
    flat["num_kv_heads"] = flat["num_kv_heads"] or flat["num_heads"]
    flat["head_dim"] = flat["head_dim"] or flat["hidden_size"] // flat["num_heads"]
    return flat
