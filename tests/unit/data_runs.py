"""Kinds of training data for the tests of delivery, and what all ranks of a mesh get of them, put together again."""

from __future__ import annotations

import functools
import hashlib
import itertools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from test_data_tiny import VOCAB_SIZE, tiny

from roformer_dist.batch import Batch
from roformer_dist.data.loader import DamageFound, Loader, StepData
from roformer_dist.data.objective import CausalObjective, MaskedObjective, Objective
from roformer_dist.data.packing import make_plan, make_plans
from roformer_dist.data.plan import PackOptions
from roformer_dist.data.shards import write_shards
from roformer_dist.data.stages import Source, Stage
from roformer_dist.data.state import DataState
from roformer_dist.data.store import ShardStore
from roformer_dist.parallel.layout import Layout

B, SEQ_LEN, SEED = 8, 64, 7
FIELDS = ("input_ids", "labels", "position_ids", "counters")
_FOLDER = tempfile.TemporaryDirectory(prefix="data-runs-")  # removed when the process ends


@functools.cache
def other_store() -> ShardStore:
    """Some of the tiny corpus in shards of its own."""
    path = Path(_FOLDER.name) / "other"
    write_shards(tiny().files[5:17], tiny().tokenizer, path, shard_bytes=2048)
    return ShardStore(path)


@functools.cache
def damaged_store() -> ShardStore:
    """The tiny shards with one byte changed in each of two documents of different shards."""
    folder = shutil.copytree(tiny().root / "shards", Path(_FOLDER.name) / "damaged")
    for shard, record in ((0, 8), (2, 0)):
        flip(folder, shard, record)
    return ShardStore(folder)


def flip(folder: Path, shard: int, record: int) -> None:
    """Change the first byte of a document."""
    offset = int(np.load(folder / f"shard-{shard:06d}.idx.npy")["offset"][record])
    with (folder / f"shard-{shard:06d}.tar").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@functools.cache
def stages_of(kind: str) -> tuple[Stage, ...]:
    """The stages of a kind in ``KINDS``."""
    store, other = tiny().store, other_store()
    plain = Source(store, (tiny().plan(),), 0.55)
    # Rows half and a quarter as long as a slot.
    short = Source(other, (make_plan(other, 32, shards_per_group=1, window=2),), 0.3)
    merged = Source(store, (make_plan(store, 16, method="concat", document_mask=False),), 0.15)
    buckets = Source(
        store, tuple(make_plans(store, SEQ_LEN, PackOptions(method="bucket", min_len=16, max_len=SEQ_LEN)))
    )
    return {
        "short form": (Stage((plain,)),),
        "mixture": (Stage((plain, short, merged)),),
        "stages": (Stage((plain,), 5), Stage((short, plain), 6), Stage((buckets,), 4), Stage((plain,))),
        "buckets": (Stage((buckets,)),),
        "quarantine": (Stage((Source(damaged_store(), plain.plans), short)),),
    }[kind]


KINDS = ("short form", "mixture", "stages", "buckets", "quarantine")
CAUSAL = CausalObjective()
MASKED = MaskedObjective(mask_id=4, vocab_size=VOCAB_SIZE)


def loader(
    kind: str,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
    workers: int = 0,
    objective: Objective = CAUSAL,
    seed: int = SEED,
    global_batch: int = B,
) -> Loader:
    """A rank's loader, with its share of a step as one micro-batch."""
    return Loader(
        stages_of(kind),
        seed=seed,
        seq_len=SEQ_LEN,
        global_batch=global_batch,
        micro_batch_size=global_batch // dp_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        objective=objective,
        workers=workers,
    )


def next_step(ranks: Sequence[Loader]) -> list[StepData]:
    """One step on every rank; damage that any of them finds is left out by all."""
    before = ranks[0].state
    steps, damage = [], set()
    for rank in ranks:
        try:
            steps.append(next(rank))
        except DamageFound as error:
            damage.update(error.damage)
    if not damage:
        return steps
    for rank in ranks:
        rank.load_state(before.leave_out(damage))
    return next_step(ranks)


class Assembler:
    """Batches from the slices that the ranks of a sequence group get of them; each is sliced once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Layout], Batch] = {}

    def __call__(self, batch: Batch, layout: Layout) -> Batch:
        key = sha256_of([batch]), layout
        if key not in self._known:
            self._known[key] = self._assemble(batch, layout)
        return self._known[key]

    def _assemble(self, batch: Batch, layout: Layout) -> Batch:
        rows, seq_len = batch.input_ids.shape
        fields = {name: torch.full((rows, seq_len), -7) for name in FIELDS}
        for sp_rank in range(layout.sp_size):
            part = layout.slice(batch, sp_rank)
            places = layout.indices(part.mask, rows, sp_rank)
            for name, whole in fields.items():
                whole.scatter_(1, places, getattr(part, name))
        return Batch(*fields.values(), mask=layout.slice(batch, 0).mask)


def sha256_of(batches: Sequence[Batch]) -> str:
    """Of the global batch that the batches are, in the order of slots: every field and the documents' ends."""
    content = hashlib.sha256()
    for name in FIELDS:
        for batch in batches:
            content.update(getattr(batch, name).numpy().tobytes())
    ends = itertools.accumulate(int(n) for b in batches for n in torch.diff(b.mask.cu_seqlens_q))
    content.update(str(list(ends)).encode())
    return content.hexdigest()


@functools.cache
def uninterrupted(kind: str, steps: int, objective: Objective = CAUSAL) -> list[tuple[str, int, DataState]]:
    """For each step of one process: sha256 of the batch, targets, and the state after it."""
    found = []
    with loader(kind, objective=objective) as whole:
        for _ in range(steps):
            (step,) = next_step([whole])
            found.append((sha256_of(step.micro_batches), step.num_valid, step.state))
    return found
