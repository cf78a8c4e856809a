"""The small training that is compared: its rows, made by the data pipeline's own code from drawn tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from roformer_dist.batch import IGNORE_INDEX, Batch
from roformer_dist.config import Config
from roformer_dist.config.data import ClassificationObjective
from roformer_dist.config.data import MaskedObjective as MaskedConfig
from roformer_dist.data.objective import CausalObjective, MaskedObjective, Objective
from roformer_dist.data.plan import Plan, load_plans
from roformer_dist.data.rows import Row, make_batches
from roformer_dist.model.heads import pool_weights
from roformer_dist.parity.shrink import ACCUMULATION, STEPS, shrink, shrink_lengths

# Mean document over row where there is no plan to take lengths from: some rows full of short ones.
SYNTHETIC_SHARES = (0.7, 0.1, 0.04)
# Replicas with rows of their own. All others read those of the last of these, so that one process, which has the
# rows of all, works no longer for more replicas. Shares this unequal show an average over some replicas alone.
OWN_ROWS = 4


@dataclass(frozen=True)
class Problem:
    """A shrunken configuration and the document lengths of every row of its steps.

    Attributes:
        config: the shrunken one.
        dp_size: replicas of the mesh.
        lengths: of the documents of each row that differs from others, ``STEPS`` times those of a step.
        documents: where the lengths come from, in words.
        seed: of tokens and weights.
    """

    config: Config
    dp_size: int
    lengths: tuple[tuple[int, ...], ...]
    documents: str
    seed: int = 0

    @property
    def own(self) -> int:
        """Replicas with rows of their own."""
        return min(self.dp_size, OWN_ROWS)

    @property
    def rows_per_step(self) -> int:
        """Rows of one step that differ: what one process works on."""
        return len(self.lengths) // STEPS

    def copies(self, number: int) -> int:
        """How many replicas read micro-batch ``number`` of a step's."""
        return self.dp_size - self.own + 1 if number % self.own == self.own - 1 else 1

    def step(self, step: int, dp_rank: int | None = None) -> tuple[list[Batch], int]:
        """Whole micro-batches of one replica (None: all that differ), and the step's targets over all replicas."""
        rows = self.rows_per_step
        slots = np.arange(rows) + rows * step
        batches = make_batches(
            [self._row(int(slot)) for slot in slots],
            # No row is the first of a run: counter 0 is what pads a row between ranks.
            slots + 1,
            self.config.train.micro_batch_size,
            make_objective(self.config),
            self.seed,
        )
        if isinstance(self.config.objective, ClassificationObjective):
            batches = [self._classified(batch) for batch in batches]
            num_valid = sum(self.copies(n) * len(batch.input_ids) for n, batch in enumerate(batches))
        else:
            num_valid = sum(self.copies(n) * batch.num_valid for n, batch in enumerate(batches))
        if dp_rank is not None:
            batches = batches[min(dp_rank, self.own - 1) :: self.own]
        return batches, num_valid

    def _classified(self, batch: Batch) -> Batch:
        """The rows with a class each instead of targets, and what they are pooled by."""
        objective, row_ids = self.config.objective, batch.counters[:, 0]
        assert isinstance(objective, ClassificationObjective)
        rows, seq_len = batch.input_ids.shape
        return replace(
            batch,
            labels=torch.full_like(batch.labels, IGNORE_INDEX),
            row_labels=row_ids // seq_len % objective.num_labels,
            row_ids=row_ids,
            pool_weights=pool_weights(objective.pooling, torch.full((rows,), seq_len), seq_len),
        )

    def _row(self, slot: int) -> Row:
        generator = np.random.default_rng([self.seed, slot])
        seq_len, lengths = self.config.train.seq_len, list(self.lengths[slot])
        # The last id is what stands for a masked token.
        tokens = generator.integers(0, self.config.model.vocab_size - 1, seq_len)
        next_tokens = np.append(tokens[1:], IGNORE_INDEX)
        next_tokens[np.cumsum(lengths) - 1] = IGNORE_INDEX
        return Row(tokens, next_tokens, lengths)


def make_problem(config: Config, *, dp_size: int, seed: int = 0) -> Problem:
    """The problem of ``config`` for ``dp_size`` replicas of its mesh; every other row is one document."""
    small = shrink(config, dp_size=dp_size)
    seq_len, rows = small.train.seq_len, small.train.micro_batch_size * min(dp_size, OWN_ROWS)
    generator = np.random.default_rng([seed, 1])
    plan = _find_plan(config)
    lengths = []
    for row in range(STEPS * ACCUMULATION * rows):
        drawn = _planned(plan, generator) if plan else _synthetic(seq_len, row, generator)
        # A document over all ranks takes part whatever the plan holds, in one of a replica's two micro-batches.
        whole = (row % rows + row // rows) % 2
        lengths.append((seq_len,) if whole else tuple(shrink_lengths(drawn, seq_len)))
    documents = (
        f"lengths drawn from {_plan_path(config)}" if plan else "synthetic lengths: no plan to draw from"
    )
    return Problem(small, dp_size, tuple(lengths), documents, seed)


def make_objective(config: Config) -> Objective:
    """The shrunken configuration's objective, as the data pipeline's."""
    if isinstance(config.objective, MaskedConfig):
        assert config.objective.mask_id is not None, "shrink sets it"
        return MaskedObjective(
            mask_id=config.objective.mask_id,
            vocab_size=config.model.vocab_size,
            mask_probability=config.objective.mask_probability,
        )
    if isinstance(config.objective, ClassificationObjective):
        # Of its batches only that they see both ways is kept.
        return MaskedObjective(mask_id=0, vocab_size=config.model.vocab_size)
    return CausalObjective()


def _plan_path(config: Config) -> str:
    return config.data.training[0].sources[0].plan


def _find_plan(config: Config) -> Plan | None:
    path = Path(_plan_path(config))
    return load_plans(path)[-1] if path.exists() else None


def _planned(plan: Plan, generator: np.random.Generator) -> list[int]:
    lengths = plan.length[plan.pieces(int(generator.integers(plan.num_rows)))].tolist()
    padding = plan.seq_len - sum(lengths)
    if not plan.document_mask:
        lengths = [sum(lengths)]
    return lengths + ([padding] if padding else [])


def _synthetic(seq_len: int, row: int, generator: np.random.Generator) -> list[int]:
    mean = SYNTHETIC_SHARES[row // 2 % len(SYNTHETIC_SHARES)] * seq_len
    lengths: list[int] = []
    while sum(lengths) < seq_len:
        lengths.append(1 + int(generator.lognormal(np.log(mean), 1.0)))
    lengths[-1] -= sum(lengths) - seq_len
    return lengths
