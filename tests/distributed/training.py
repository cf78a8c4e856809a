"""A small training problem, once on plain PyTorch and once on the Engine, for the parity tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.config import Config, derive, parse_config
from roformer_dist.kernels.attention import choose_kernel
from roformer_dist.model.roformer import build_model
from roformer_dist.objectives import SummedLoss
from roformer_dist.parallel.sequence_ops import sequence_ops, single_sequence_ops

ROWS, SEQ_LEN, VOCAB = 8, 26, 61
# Documents of odd lengths; none of the cuts falls on a boundary between two ranks.
DOCUMENTS = ([7, 19], [26], [1, 1, 24], [11, 15])


def make_config(**changes: Any) -> Config:
    """A tiny run; ``changes`` are section__key=value."""
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 40,
            "hidden_dropout": 0.1,
            "init_std": 0.1,
        },
        "data": {
            "tokenizer": "none",
            "train": {"shards": "none", "plan": "none"},
            "validation": {"shards": "none", "plan": "none"},
        },
        "parallel": {"sp_size": 2},
        "train": {
            "seq_len": SEQ_LEN,
            "tokens_per_step": ROWS * SEQ_LEN,
            "num_steps": 10,
            "precision": "fp32",
        },
        "optimizer": {"lr": 1e-2, "max_grad_norm": 0.5},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "checkpoint": {"every_steps": 5},
        "validation": {"every_steps": 5, "rows": 4},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    return parse_config(values, source="test")


def make_rows(step: int) -> tuple[list[Batch], int]:
    """The rows of a step, one Batch each, and the number of its targets; unequal from row to row."""
    rows, num_valid = [], 0
    for row in range(ROWS):
        generator = torch.Generator().manual_seed(100 * step + row)
        lengths = DOCUMENTS[row % len(DOCUMENTS)]
        ids = torch.randint(0, VOCAB, (1, SEQ_LEN + 1), generator=generator)
        labels = ids[:, 1:].clone()
        ends = torch.tensor(lengths).cumsum(0) - 1
        labels[:, ends] = IGNORE_INDEX
        if row == 3:
            labels[:, : SEQ_LEN // 2] = IGNORE_INDEX  # a rank without a single target
        slot = step * ROWS + row
        batch = Batch(
            input_ids=ids[:, :-1],
            labels=labels,
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            counters=slot * SEQ_LEN + torch.arange(SEQ_LEN)[None],
            mask=MaskSpec.from_lengths(list(lengths), causal=True),
        )
        rows.append(batch)
        num_valid += batch.num_valid
    return rows, num_valid


def join(rows: list[Batch]) -> Batch:
    """Rows stacked into one micro-batch."""
    lengths = [n for row in rows for n in torch.diff(row.mask.cu_seqlens_q).tolist()]
    return Batch(
        *(
            torch.cat([getattr(row, name) for row in rows])
            for name in ("input_ids", "labels", "position_ids", "counters")
        ),
        mask=MaskSpec.from_lengths(lengths, causal=True),
    )


def train_plainly(config: Config, steps: int) -> dict[str, Any]:
    """The reference: one process, plain PyTorch, its own clipping and AdamW; no code of the engine."""
    network = build_model(config.model, masked=False, seed=config.train.seed)
    ops = single_sequence_ops(choose_kernel("sdpa", "cpu")[0])
    # Words, positions and T5's buckets are looked up; what is looked up does not decay.
    named = dict(network.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim > 1 and "embedding" not in n and "table" not in n]
    others = [p for p in named.values() if not any(p is other for other in matrices)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    losses, norms, first = [], [], {}
    for step in range(steps):
        rows, num_valid = make_rows(step)
        nll_sum, _ = SummedLoss(network)(join(rows), ops)
        loss = nll_sum / num_valid
        optimizer.zero_grad()
        loss.backward()
        first = first or {name: p.grad.clone() for name, p in network.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATES[step]
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms, "gradients": first, "parameters": _copy(network)}


def gradients_in(dtype: torch.dtype, config: Config | None = None) -> dict[str, Tensor]:
    """The first step's gradients in one process, the network in ``dtype``."""
    config = config or make_config()
    network = build_model(config.model, masked=False, seed=config.train.seed).to(dtype)
    rows, num_valid = make_rows(0)
    nll_sum, _ = SummedLoss(network)(join(rows), single_sequence_ops(choose_kernel("sdpa", "cpu")[0]))
    (nll_sum / num_valid).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


# Two steps of warm-up to 1e-2, then half a cosine down to a tenth at step 10, written out.
LEARNING_RATES = [0.005, 0.01, *(0.001 + 0.0045 * (1 + c) for c in (
    0.92387953251, 0.70710678119, 0.38268343236, 0.0, -0.38268343236, -0.70710678119, -0.92387953251, -1.0
))]  # fmt: skip


def train_with_engine(config: Config, steps: int, precision: str = "fp32") -> dict[str, Any]:
    """The product's path, on this rank of the group that the caller has joined."""
    from roformer_dist.engine.engine import Engine, gradients, parameters
    from roformer_dist.engine.schedule import learning_rate
    from roformer_dist.parallel.comm import GroupComm
    from roformer_dist.parallel.mesh import build_mesh

    mesh = build_mesh(GroupComm(), ulysses_size=config.parallel.ulysses, ring_size=config.parallel.ring_size)
    shape = derive(config, mesh.world.size)
    ops, layout = sequence_ops(choose_kernel("sdpa", "cpu")[0], mesh, config.parallel.head_chunks)
    network = build_model(config.model, masked=False, seed=config.train.seed)
    engine = Engine(config, shape, precision, network, ops)
    losses, norms, first = [], [], {}
    for step in range(steps):
        rows, num_valid = make_rows(step)
        mine = rows[mesh.dp_rank :: mesh.dp_size]
        size = config.train.micro_batch_size
        micro_batches = [
            layout.slice(join(mine[start : start + size]), mesh.sp.rank)
            for start in range(0, len(mine), size)
        ]
        nll_sum, _ = engine.forward_backward(micro_batches, num_valid)
        first = first or gradients(engine)
        norms.append(engine.update(learning_rate(config, step)))
        losses.append(float(mesh.world.all_sum(torch.tensor(nll_sum, dtype=torch.float64))) / num_valid)
    final = parameters(engine)
    engine.close()
    return {"losses": losses, "norms": norms, "gradients": first, "parameters": final}


def _copy(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}
