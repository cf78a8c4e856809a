"""A checkpoint made ready for use: what ``extrapolate`` and ``generate`` begin with, on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roformer_dist.config import Config, parse_config
from roformer_dist.config.data import Objective
from roformer_dist.config.load import apply_overrides, parse_description
from roformer_dist.config.model import ModelConfig
from roformer_dist.engine.checkpoint import CheckpointReader, load_parameters
from roformer_dist.engine.checkpoint_files import MANIFEST
from roformer_dist.model.roformer import RoFormer, build_for


@dataclass(frozen=True)
class Trained:
    """A checkpoint made ready for evaluation in this process.

    Attributes:
        config: of the run that wrote it; None where it holds parameters alone, as an import does.
        token_ids: what an import says of its special tokens, ``eos_token_id`` and the like.
    """

    path: Path
    fingerprint: str
    step: int
    model: ModelConfig
    objective: Objective
    config: Config | None
    token_ids: Mapping[str, Any]
    network: RoFormer

    def run_config(self) -> Config:
        """The configuration of its run.

        Raises:
            ValueError: it has none.
        """
        if self.config is None:
            raise ValueError(
                f"{self.path}: holds parameters alone, without data to evaluate on; give a run that started from "
                "them (checkpoint.init_from)"
            )
        return self.config


def load_trained(path: Path, overrides: Sequence[str] = (), *, device: torch.device | str = "cpu") -> Trained:
    """The network of a checkpoint in the precision it was trained in.

    Args:
        overrides: ``model.key=value`` changes of the configuration that leave the weights as they are.

    Raises:
        ValueError: an override of another section, or one that the configuration or the weights do not fit.
    """
    for override in overrides:
        if not override.startswith("model."):
            raise ValueError(f"--set {override!r}: only keys of model count here, such as model.rope.scaling")
    reader = CheckpointReader(path)
    values = apply_overrides(reader.state["config"], overrides)
    whole = "train" in values
    config = (parse_config if whole else parse_description)(values, source=f"{path}: config")
    network = build_for(config.model, config.objective, seed=0)
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
    return Trained(
        path=path,
        fingerprint=hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest(),
        step=reader.step,
        model=config.model,
        objective=config.objective,
        config=config if isinstance(config, Config) else None,
        token_ids=reader.state.get("huggingface", {}),
        network=network.to(device),
    )


def _check_shapes(network: RoFormer, reader: CheckpointReader) -> None:
    for name, parameter in network.named_parameters():
        stored = reader.parameters.get(name, parameter.shape)
        if tuple(stored) != tuple(parameter.shape):
            raise ValueError(
                f"{reader.path}: {name} is {list(stored)}, and the configuration makes it {list(parameter.shape)}; "
                "--set may not change the shape of a weight"
            )
