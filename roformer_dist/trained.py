"""A checkpoint made ready for use in one process: what ``extrapolate`` and ``generate`` begin with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from roformer_dist.config import Config, parse_config
from roformer_dist.config.load import apply_overrides
from roformer_dist.engine.checkpoint import CheckpointReader, load_parameters
from roformer_dist.engine.checkpoint_files import MANIFEST
from roformer_dist.model.roformer import RoFormer, build_for


@dataclass(frozen=True)
class Trained:
    """A checkpoint made ready for evaluation in this process."""

    path: Path
    fingerprint: str
    step: int
    config: Config
    network: RoFormer


def load_trained(path: Path, overrides: Sequence[str] = ()) -> Trained:
    """The network of a checkpoint in the precision it was trained in, on the CPU.

    Args:
        overrides: ``model.key=value`` changes of the configuration that leave the weights as they are.

    Raises:
        ValueError: an override of another section, or one that the configuration or the weights do not fit.
    """
    for override in overrides:
        if not override.startswith("model."):
            raise ValueError(f"--set {override!r}: only keys of model count here, such as model.rope.scaling")
    reader = CheckpointReader(path)
    if "train" not in reader.state["config"]:
        raise ValueError(
            f"{path}: holds parameters alone; give a run that started from them (checkpoint.init_from)"
        )
    values = apply_overrides(reader.state["config"], overrides)
    config = parse_config(values, source=f"{path}: config")
    network = build_for(config.model, config.objective, seed=config.train.seed)
    _check_shapes(network, reader)
    # A tied output layer is stored once, under the embedding's name.
    missing, unexpected = network.load_state_dict(load_parameters(path), strict=False)
    tied = {"head.projection.weight"} if config.model.tie_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ValueError(
            f"{path}: parameters {sorted(unexpected) + sorted(set(missing) - tied)} do not fit the model"
        )
    if "bfloat16" in reader.dtypes.values():
        network = network.to(torch.bfloat16)
    fingerprint = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    return Trained(path, fingerprint, reader.step, config, network)


def _check_shapes(network: RoFormer, reader: CheckpointReader) -> None:
    for name, parameter in network.named_parameters():
        stored = reader.parameters.get(name, parameter.shape)
        if tuple(stored) != tuple(parameter.shape):
            raise ValueError(
                f"{reader.path}: {name} is {list(stored)}, and the configuration makes it {list(parameter.shape)}; "
                "--set may not change the shape of a weight"
            )
