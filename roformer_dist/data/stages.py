"""Stages: which rows of which plans fill every slot of a training, as a pure function of the slot.

A slot is the place of one row of ``seq_len`` tokens, and step ``k`` of ``B`` slots is the slots ``kB`` to
``kB + B - 1``. A plan of rows ``f`` times shorter fills a slot with ``f`` of them, one after another. So
every step has the same number of tokens, and a batch the same shape, whatever is read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from roformer_dist.data.errors import DataError
from roformer_dist.data.files import sha256_json
from roformer_dist.data.mixture import BLOCK, Mixture, quotas_of
from roformer_dist.data.order import RowOrder
from roformer_dist.data.plan import Plan
from roformer_dist.data.store import ShardStore

HASH_DIGITS = 32  # of a sha256 in hexadecimal, in the state: enough to tell data apart
_SLOTS_TOGETHER = 1024


@dataclass(frozen=True)
class Source:
    """Documents and how they are packed: one plan, or one for each bucket of row lengths."""

    store: ShardStore
    plans: tuple[Plan, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Stage:
    """Sources that are mixed by weight, for ``num_steps`` steps (None: to the end)."""

    sources: tuple[Source, ...]
    num_steps: int | None = None


@dataclass(frozen=True)
class Part:
    """Rows of one plan in a step.

    Attributes:
        store, plan: where they are; ``store_number`` counts stores from 0 over all stages.
        slots: int64 ``[n]``, ascending.
        rows: int64 ``[n, f]``, the ``f = seq_len / plan.seq_len`` rows of each slot.
    """

    store: ShardStore
    store_number: int
    plan: Plan
    slots: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class _Drawn:
    """One plan in one stage; ``skip`` rows of it were drawn in the stages before."""

    store_number: int
    store: ShardStore
    plan: Plan
    order: RowOrder
    per_slot: int
    skip: int


@dataclass(frozen=True)
class _Resolved:
    """A stage with its place in the run; the mixture draws ``unit`` slots at a time."""

    first_step: int
    drawn: tuple[_Drawn, ...]
    mixture: Mixture
    unit: int
    plan_hash: str


class Timeline:
    """The rows of every step of a run.

    A source that is in several stages goes on in a later one where it stood. The sources of a stage are
    mixed slot by slot; a source of several plans (buckets) takes whole steps, each of one plan, in
    proportion to the tokens of the plans.

    Args:
        stages: at least one; only the last may be without ``num_steps``.
        seed: of the order of rows.
        seq_len: tokens of a slot.
        global_batch: slots of a step.

    Raises:
        DataError: a plan of other shards, rows that do not fit into a slot, weights that cannot be met.
    """

    def __init__(self, stages: Sequence[Stage], *, seed: int, seq_len: int, global_batch: int) -> None:
        assert stages
        assert all(stage.num_steps for stage in stages[:-1])
        self.seed, self.seq_len, self.global_batch = seed, seq_len, global_batch
        self.stores: list[ShardStore] = []
        self._stages: list[_Resolved] = []
        drawn_before: dict[str, int] = {}  # rows by plan hash
        first_step = 0
        for stage in stages:
            resolved = self._resolve(stage, first_step, drawn_before)
            self._stages.append(resolved)
            if stage.num_steps:
                counts = resolved.mixture.counts(stage.num_steps * global_batch // resolved.unit)
                for drawn, count in zip(resolved.drawn, counts.tolist(), strict=True):
                    rows = drawn.skip + count * resolved.unit * drawn.per_slot
                    drawn_before[drawn.plan.hash] = rows
                first_step += stage.num_steps
        self._first_steps = [stage.first_step for stage in self._stages]
        # The order of many slots costs hardly more than that of a few.
        self._together = max(1, _SLOTS_TOGETHER // global_batch)
        self._computed = lru_cache(maxsize=4)(self._compute)

    @property
    def plan_hashes(self) -> tuple[str, ...]:
        """For each stage, what its rows depend on: the plan's hash, or that of several, weights and start."""
        return tuple(stage.plan_hash for stage in self._stages)

    @property
    def manifest_root(self) -> str:
        """The root hash of the shards, or the hash of the roots where there are several folders."""
        return _hash_of([store.root for store in self.stores])

    def stage_of(self, step: int) -> int:
        """The number of the stage that ``step`` is in, from 0."""
        return bisect_right(self._first_steps, step) - 1

    def parts(self, step: int) -> list[Part]:
        """What fills the slots of ``step``: one part for each plan that is drawn."""
        first, parts = self._computed(self.stage_of(step), step // self._together)
        return parts[step - first]

    def _compute(self, stage_number: int, block: int) -> tuple[int, list[list[Part]]]:
        """The first step of a block of steps that is in the stage, and the parts of each of them."""
        stage = self._stages[stage_number]
        first, last = max(block * self._together, stage.first_step), (block + 1) * self._together
        last = min([last, *self._first_steps[stage_number + 1 : stage_number + 2]])
        slots = np.arange(first * self.global_batch, last * self.global_batch)
        draws, within = np.divmod(slots - stage.first_step * self.global_batch, stage.unit)
        source, count = stage.mixture.draw(draws)
        parts: list[list[Part]] = [[] for _ in range(first, last)]
        for number in np.unique(source).tolist():
            here, drawn = np.flatnonzero(source == number), stage.drawn[number]
            slot_numbers = count[here] * stage.unit + within[here]
            numbers = drawn.skip + slot_numbers[:, None] * drawn.per_slot + np.arange(drawn.per_slot)
            rows = drawn.order.rows(numbers)
            cuts = np.searchsorted(here, np.arange(1, len(parts)) * self.global_batch)
            for of_step, s, r in zip(parts, np.split(slots[here], cuts), np.split(rows, cuts), strict=True):
                if len(s):
                    of_step.append(Part(drawn.store, drawn.store_number, drawn.plan, s, r))
        return first, parts

    def _resolve(self, stage: Stage, first_step: int, drawn_before: dict[str, int]) -> _Resolved:
        buckets = len(stage.sources[0].plans) > 1
        if any(len(source.plans) > 1 for source in stage.sources[1:]) or (buckets and len(stage.sources) > 1):
            raise DataError(
                f"a stage mixes {len(stage.sources)} sources, one of them in buckets of row lengths; give that "
                "one a stage of its own, or name the plan of one bucket"
            )
        drawn = tuple(
            self._draw(source.store, plan, drawn_before) for source in stage.sources for plan in source.plans
        )
        hashes = [d.plan.hash for d in drawn]
        if len(set(hashes)) < len(hashes):
            raise DataError("a stage names the same plan twice; name it once, with the sum of the weights")
        quotas = _bucket_quotas(drawn) if buckets else _source_quotas(stage.sources)
        plain = len(hashes) == 1 and first_step == 0
        return _Resolved(
            first_step=first_step,
            drawn=drawn,
            mixture=Mixture(quotas),
            unit=self.global_batch if buckets else 1,
            plan_hash=_hash_of(hashes if plain else [first_step, hashes, quotas]),
        )

    def _draw(self, store: ShardStore, plan: Plan, drawn_before: dict[str, int]) -> _Drawn:
        plan.check_store(store)
        if self.seq_len % plan.seq_len:
            raise DataError(
                f"the plan of {store.path} has rows of {plan.seq_len} tokens, which do not fill "
                f"train.seq_len = {self.seq_len} evenly; run data pack with a --seq-len that divides it"
            )
        roots = [known.root for known in self.stores]
        if store.root not in roots:
            self.stores.append(store)
            roots.append(store.root)
        number = roots.index(store.root)
        order = RowOrder(plan.group_offsets, plan.window, seed=self.seed, source=int(plan.hash[:16], 16))
        skip = drawn_before.get(plan.hash, 0)
        return _Drawn(number, self.stores[number], plan, order, self.seq_len // plan.seq_len, skip)


def _source_quotas(sources: Sequence[Source]) -> list[int]:
    quotas = quotas_of([source.weight for source in sources])
    for source, quota in zip(sources, quotas, strict=True):
        if not quota:
            raise DataError(
                f"the weight {source.weight} of {source.store.path} is less than one row in {BLOCK:,}; "
                "raise it or leave the source out"
            )
    return quotas


def _bucket_quotas(drawn: Sequence[_Drawn]) -> list[int]:
    """In proportion to tokens, but no bucket is left out."""
    quotas = quotas_of([d.plan.num_rows * d.plan.seq_len for d in drawn])
    return [max(1, quota) for quota in quotas]


def _hash_of(parts: list[str] | list[object]) -> str:
    """The one hash, or the hash of all of them, shortened."""
    whole = parts[0] if len(parts) == 1 else sha256_json(parts)
    return str(whole)[:HASH_DIGITS]
