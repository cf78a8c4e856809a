"""Tiny models of both sides, and what each computes, for the tests of import and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import TypeAdapter
from torch import Tensor

from roformer_dist.batch import Batch, MaskSpec
from roformer_dist.config.data import ClassificationObjective, Objective
from roformer_dist.config.model import ModelConfig
from roformer_dist.engine.checkpoint import CheckpointReader, load_parameters
from roformer_dist.engine.checkpoint_files import Fragment
from roformer_dist.engine.initial import write_parameters
from roformer_dist.exchange import checkpoint_sections
from roformer_dist.kernels.attention import choose_kernel
from roformer_dist.model.roformer import RoFormer, build_for
from roformer_dist.objectives import row_logits
from roformer_dist.parallel.sequence_ops import single_sequence_ops

VOCAB, TRAINED = 61, 32
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": YARN,
    "yarn_mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 8.0, "truncate": False},
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 1.5, 2.5, 4.0],
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def their_model(architecture: str, **values: Any) -> Any:
    """A transformers model with every weight, bias and norm drawn at random, so that none can be swapped unseen."""
    values = {**SIZES, "max_position_embeddings": TRAINED, **values}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values.setdefault(key, None)
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(architectures=[architecture], **values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                parameter.normal_(1.0 if "norm" in name.lower() and "weight" in name else 0.0, 0.2)
    return model.eval()


def some_tokens(length: int) -> Tensor:
    """Two rows."""
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(length))


def their_logits(model: Any, tokens: Tensor) -> Tensor:
    """What transformers computes."""
    with torch.no_grad():
        return model(input_ids=tokens).logits


def our_logits(network: RoFormer, objective: Objective, tokens: Tensor) -> Tensor:
    """What we compute; every row is one document."""
    rows, seq_len = tokens.shape
    batch = Batch(
        input_ids=tokens,
        labels=torch.full_like(tokens, -100),
        position_ids=torch.arange(seq_len).expand(rows, seq_len),
        counters=torch.arange(rows * seq_len).view(rows, seq_len),
        mask=MaskSpec.from_lengths([seq_len] * rows, causal=objective.kind == "causal"),
        pool_weights=torch.eye(seq_len)[0].expand(rows, seq_len),
    )
    ops = single_sequence_ops(choose_kernel("auto", "cpu")[0])
    with torch.no_grad():
        if isinstance(objective, ClassificationObjective):
            return row_logits(network, batch, ops)
        features: Any = network.head(network(batch, ops))
        logits = features @ network.head.weight.T
        return logits if network.head.bias is None else logits + network.head.bias


def our_model(model: dict[str, Any], objective: dict[str, Any]) -> tuple[RoFormer, Objective]:
    """A network of ours with every parameter drawn at random."""
    wanted: Objective = TypeAdapter(Objective).validate_python(objective)
    network = build_for(ModelConfig.model_validate(model), wanted, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.2, generator=generator)
    return network.eval(), wanted


def save_ours(network: RoFormer, objective: Objective, run: Path, seq_len: int = TRAINED) -> Path:
    """A run's directory with a checkpoint of ``network``."""
    parts = [
        [
            Fragment(name, "parameter", tuple(p.shape), 0, p.detach().flatten(), "float32")
            for name, p in network.named_parameters()
        ]
    ]
    config = {
        "model": network.config.model_dump(mode="json"),
        "objective": objective.model_dump(mode="json"),
        "train": {"seq_len": seq_len},
    }
    return write_parameters(run / "checkpoints", parts, {"step": 0, "tokens_seen": 0, "config": config})


def load_ours(checkpoint: Path) -> tuple[RoFormer, Objective]:
    """The network of a checkpoint."""
    model, objective = checkpoint_sections(CheckpointReader(checkpoint))
    network = build_for(model, objective, seed=1)
    parameters = load_parameters(checkpoint)
    assert parameters.keys() == {name for name, _ in network.named_parameters()}
    network.load_state_dict(parameters, strict=False)  # a tied weight has two names there
    return network.eval(), objective
