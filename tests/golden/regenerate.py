"""What must not drift, and the command that says it was meant to:

    python tests/golden/regenerate.py

writes ``configs/NAME.toml`` (every recipe with its defaults written out) and ``loss_curve.json`` (a tiny
fixed run). The difference it makes in git is what a reviewer looks at.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.config import Config, dump_config, load_config, parse_config
from roformer_dist.engine.optimizer import build_optimizer
from roformer_dist.engine.schedule import learning_rate
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model.roformer import build_model
from roformer_dist.objectives import SummedLoss
from roformer_dist.parallel.sequence_ops import single_sequence_ops

HERE = Path(__file__).parent
RECIPES = HERE.parent.parent / "configs"
RESOLVED = HERE / "configs"
LOSS_CURVE = HERE / "loss_curve.json"

SOURCE = {"shards": "unused", "plan": "unused"}
TINY = {
    "name": "tiny",
    "model": {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 64,
        "hidden_dropout": 0.1,
    },
    "data": {"tokenizer": "unused", "train": SOURCE, "validation": SOURCE},
    "train": {"seq_len": 48, "tokens_per_step": 192, "num_steps": 30, "seed": 7, "precision": "fp32"},
    "optimizer": {"lr": 1e-2},
    "schedule": {"kind": "cosine", "warmup_steps": 5},
    "checkpoint": {"every_steps": 30},
    "validation": {"every_steps": 30, "rows": 4},
}


def recipes() -> list[Path]:
    """Every recipe's file."""
    return sorted(RECIPES.glob("*.toml"))


def resolved(recipe: Path) -> str:
    """A recipe with every default written out."""
    return dump_config(load_config(recipe))


def tiny_config() -> Config:
    """The configuration of the fixed run."""
    return parse_config(TINY, source="tiny")


def step_batch(config: Config, step: int) -> Batch:
    """Rows of two documents each, whose tokens count upwards by a stride: something that can be learned.

    Integer arithmetic alone, so that no generator of random numbers is part of what is fixed.
    """
    seq_len, vocab = config.train.seq_len, config.model.vocab_size
    slots = torch.arange(config.train.tokens_per_step // seq_len)[:, None] + 4 * step
    places = torch.arange(seq_len)
    first = seq_len // 3
    positions = torch.where(places < first, places, places - first).expand(len(slots), seq_len)
    stride = torch.where(places < first, slots % 3 + 1, slots % 5 + 1)
    ids = (slots * 11 + positions * stride) % vocab
    labels = ids.roll(-1, dims=1)
    labels[:, [first - 1, seq_len - 1]] = IGNORE_INDEX
    mask = MaskSpec.from_lengths([first, seq_len - first] * len(slots), causal=True)
    return Batch(ids, labels, positions, slots * seq_len + places, mask)


def loss_curve() -> dict[str, list[float]]:
    """Mean loss, gradient norm and learning rate of every step of the fixed run, one process, fp32."""
    config = tiny_config()
    objective = SummedLoss(build_model(config.model, masked=False, seed=config.train.seed))
    optimizer = build_optimizer(objective.network, config.optimizer)
    ops = single_sequence_ops(SdpaKernel())
    curve: dict[str, list[float]] = {"loss": [], "grad_norm": [], "lr": []}
    for step in range(config.train.num_steps):
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = step_batch(config, step)
        nll_sum, num_valid = objective(batch, ops)
        loss = nll_sum / num_valid
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        for name, value in (("loss", loss.item()), ("grad_norm", norm.item()), ("lr", lr)):
            curve[name].append(value)
    return curve


def main() -> None:
    """Write every golden file anew; a recipe that is gone takes its file along."""
    torch.set_num_threads(1)
    RESOLVED.mkdir(exist_ok=True)
    for stale in RESOLVED.glob("*.toml"):
        stale.unlink()
    for recipe in recipes():
        (RESOLVED / recipe.name).write_text(resolved(recipe), encoding="utf-8")
    LOSS_CURVE.write_text(json.dumps(loss_curve(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
