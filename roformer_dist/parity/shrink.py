"""PURE: a configuration made small enough to be trained by one process, with everything that spreads it kept.

Kept: the mesh, head counts, kinds of layers, position and scaling, the objective, the shape of the packing,
the kind of schedule, clipping, ZeRO stage and offload, checkpointing and tiles. Shrunk: widths, depth to the pattern of
layers, vocabulary, rows and replicas. Initial weights are wide and AdamW's epsilon large, so that a wrong
score shows in the loss and rounding does not show in the parameters.
"""

from __future__ import annotations

import math
from typing import Any

from roformer_dist.config import Config, ModelConfig, RopeConfig
from roformer_dist.config.layers import LearnedPosition
from roformer_dist.config.rope import DynamicScaling, LongRopeScaling

STEPS = 3
ACCUMULATION = 2
HIDDEN, EMBEDDING, INTERMEDIATE, VOCABULARY = 64, 48, 80, 101
HEAD_DIMS = (8, 16, 32, 64)
# A few pieces on each rank of any ring, and enough for documents to begin and end inside them.
TOKENS_PER_RANK, FEWEST_TOKENS = 12, 96


def shrink(config: Config, *, dp_size: int) -> Config:
    """``config`` for ``STEPS`` steps of a tiny network on ``dp_size`` replicas of its mesh.

    Rows are one token longer than the ranks divide, so that padding between ranks takes part.
    """
    sp_size, train = config.parallel.sp_size, config.train
    seq_len = max(FEWEST_TOKENS, TOKENS_PER_RANK * sp_size) + 1
    ratio = seq_len / train.seq_len
    micro_batch_size = min(train.micro_batch_size, 2)
    rows = dp_size * micro_batch_size * ACCUMULATION
    local, small_local = -(-train.seq_len // sp_size), -(-seq_len // sp_size)
    tile = train.mlp_tile_tokens
    values = config.model_dump()
    values["model"] = _model(config.model, seq_len, ratio)
    values["train"] |= {
        "seq_len": seq_len,
        "tokens_per_step": rows * seq_len,
        "micro_batch_size": micro_batch_size,
        "num_steps": STEPS,
        "mlp_tile_tokens": tile and max(1, small_local * tile // local),
        "compile": False,
    }
    # What rounds by design cannot be compared within the bounds of what must not.
    values["parallel"] |= {"quantized_weights": False, "quantized_gradients": False}
    # Shares this small are never swapped: with a disk or without one they stay in host memory.
    values["parallel"]["nvme_path"] = None
    for name in ("offload_optimizer", "offload_parameters"):
        if values["parallel"][name] == "nvme":
            values["parallel"][name] = "cpu"
    values["optimizer"] |= {"lr": 1e-2, "eps": 1e-3}
    values["schedule"]["warmup_steps"] = 2
    if "decay_steps" in values["schedule"]:
        values["schedule"]["decay_steps"] = 1
    values["data"] |= {"train": values["data"]["validation"], "stages": None}
    if values["objective"]["kind"] == "masked":
        values["objective"]["mask_id"] = values["model"]["vocab_size"] - 1
    return Config.model_validate(values)


def shrink_lengths(lengths: list[int], seq_len: int) -> list[int]:
    """Document lengths of a row of ``seq_len`` tokens in proportion to ``lengths``, each at least one token.

    Of a row with more documents than fit, as many as the row can tell apart are taken, evenly.
    """
    most = max(1, seq_len // 8)
    if len(lengths) > most:
        lengths = [lengths[number * len(lengths) // most] for number in range(most)]
    total, small, done, given = sum(lengths), [], 0, 0
    for number, length in enumerate(lengths):
        done += length
        left = len(lengths) - number - 1
        # Rounded at the documents' ends, so that the lengths add up to the row.
        end = min(max(round(seq_len * done / total), given + 1), seq_len - left)
        small.append(end - given)
        given = end
    return small


def _model(model: ModelConfig, seq_len: int, ratio: float) -> dict[str, Any]:
    head_dim = _head_dim(model)
    values = model.model_dump()
    values |= {
        "vocab_size": min(model.vocab_size, VOCABULARY),
        "hidden_size": HIDDEN,
        "embedding_size": EMBEDDING if model.embedding_width != model.hidden_size else None,
        "num_layers": max(len(model.layers), min(model.num_layers, 2)),
        "head_dim": head_dim,
        "intermediate_size": INTERMEDIATE,
        "init_std": 0.15,
        "rope": _rope(model.rope, head_dim, ratio),
    }
    if model.sliding_window is not None:
        values["sliding_window"] = max(2, round(model.sliding_window * ratio))
    if isinstance(model.position, LearnedPosition):
        values["position"]["max_seq_len"] = seq_len
    return values


def _head_dim(model: ModelConfig) -> int:
    """The smallest width of a head that can be turned the way that the configuration asks for."""
    for head_dim in HEAD_DIMS:
        try:
            RopeConfig.model_validate(_rope(model.rope, head_dim, 1.0)).check(head_dim)
        except ValueError:
            continue
        return min(head_dim, model.head_size)
    return model.head_size


def _rope(rope: RopeConfig, head_dim: int, ratio: float) -> dict[str, Any]:
    values = rope.model_dump()
    scaling, pairs = rope.scaling, rope.rotary_dim(head_dim) // 2
    if isinstance(scaling, LongRopeScaling):
        for name in ("short_factor", "long_factor"):
            values["scaling"][name] = values["scaling"][name][:pairs]
    if isinstance(scaling, LongRopeScaling | DynamicScaling):
        # Rows are longer than what was trained, or not, as the configuration's are.
        trained = scaling.original_seq_len * ratio
        values["scaling"]["original_seq_len"] = max(2, math.ceil(trained))
    if rope.policy.kind != "plain":
        group = values["policy"].get("group", 1)
        values["policy"]["window"] = max(2, group, round(rope.policy.window * ratio))
    return values
