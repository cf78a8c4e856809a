"""A guard on counted memory: bytes that a block keeps for its backward, never what an allocator reports.

For a token of one block in bf16 (C hidden_size, I intermediate_size, N query heads, M key/value heads, D head_dim):

    pre-norm, RMSNorm, SwiGLU                      8 C + 4 I + N (4 D + 4) + 4 M D + 8
    post-norm, LayerNorm, GELU, hidden dropout    10 C + 2 I + N (4 D + 4) + 4 M D + 8

N (4 D + 4) is q, the output and lse; 4 M D is k and v; 8 is what two norms remember; what the MLP's nonlinearity
makes is made again in the backward. Recipes quote these figures.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import regenerate
import torch
from torch import Tensor

from roformer_dist.batch import Batch, MaskSpec
from roformer_dist.config import ModelConfig, load_config
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model.roformer import build_model
from roformer_dist.objectives import SummedLoss
from roformer_dist.parallel.sequence_ops import single_sequence_ops

TOKENS = 32
MODERN: dict[str, Any] = {}
PAPER = {"block": "post_norm", "norm": "layer_norm", "mlp": "gelu", "bias": True, "hidden_dropout": 0.1}


def formula(model: ModelConfig) -> int:
    """Bytes for a token of one block."""
    width, inner = (8, 4) if model.block == "pre_norm" else (10, 2)
    head_dim = model.head_size
    heads = model.num_heads * (4 * head_dim + 4) + 4 * model.kv_heads * head_dim
    return width * model.hidden_size + inner * model.intermediate_size + heads + 8


def kept_bytes(model: ModelConfig) -> int:
    """Bytes of everything but parameters that autograd keeps after a forward in bf16, each storage once."""
    objective = SummedLoss(build_model(model, masked=False, seed=0)).bfloat16()
    parameters = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor
        return tensor

    ids = torch.arange(TOKENS)[None]
    batch = Batch(ids % 8, ids % 8, ids, ids, MaskSpec.from_lengths([TOKENS], causal=True))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = objective(batch, single_sequence_ops(SdpaKernel()))
        total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert loss.requires_grad
    return total


@pytest.mark.parametrize("style", [MODERN, PAPER], ids=["modern", "paper"])
@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"),
    [(64, 96, 4, 4, 16), (64, 96, 4, 2, 16), (128, 96, 8, 2, 24), (64, 256, 2, 1, 32)],
)
def test_a_block_keeps_what_its_shape_says(
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    style: dict[str, Any],
) -> None:
    def model(num_layers: int) -> ModelConfig:
        return ModelConfig(
            vocab_size=8,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=intermediate_size,
            **style,
        )

    # The difference between two and three blocks: embedding, head and phases fall away.
    assert kept_bytes(model(3)) - kept_bytes(model(2)) == TOKENS * formula(model(1))


@pytest.mark.parametrize(
    "recipe", [path for path in regenerate.recipes() if path.stem != "quickstart"], ids=lambda path: path.stem
)
def test_a_recipe_quotes_its_own_figures(recipe: Path) -> None:
    config = load_config(recipe)
    comment = recipe.read_text(encoding="utf-8").replace("\n# ", " ")
    quoted = re.search(r"x (\d+) layers x ([\d,]+) bytes kept for the backward", comment)
    assert quoted
    assert int(quoted[1]) == config.model.num_layers
    assert quoted[2] == f"{formula(config.model):,}"
