"""How a network is run, beside what it computes: memory against time. Nothing here changes a result."""

from __future__ import annotations

import importlib.util
import shutil

import torch
from torch import nn

from roformer_dist.config.training import TrainConfig
from roformer_dist.model.blocks import Block
from roformer_dist.model.memory import ActivationMemory
from roformer_dist.model.roformer import RoFormer


def apply_options(network: RoFormer, train: TrainConfig, device: torch.device) -> None:
    """Checkpointing, offload, tiles and compilation of ``train`` on ``network``, in place.

    Raises:
        ValueError: compilation is asked for and there is no compiler.
    """
    network.memory = ActivationMemory(train.activation_checkpointing, train.activation_offload)
    for block in network.blocks:
        assert isinstance(block, Block)
        block.mlp.tile_tokens = train.mlp_tile_tokens
    if train.compile:
        check_compiler(device)
        _compile(network)


def check_compiler(device: torch.device) -> None:
    """ValueError in one line where torch.compile could not work."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++")):
        raise ValueError(
            "train.compile = true needs a C++ compiler on this machine (g++ or clang++, on Debian or Ubuntu: "
            "apt-get install g++); install one or set train.compile = false"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError(
            "train.compile = true needs triton on CUDA: pip install triton, or set train.compile = false"
        )


def _compile(network: RoFormer) -> None:
    # Attention, rotation and loss are operations with a backward of their own, and masks are data: they stay outside.
    for block in network.blocks:
        assert isinstance(block, Block)
        parts: tuple[nn.Module, ...] = (block.attention_norm, block.mlp, block.mlp_norm)
        for module in parts:
            module.compile()
