"""Where a training is in its data: one number, and what it must be the same data for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from roformer_dist.data.errors import DataError
from roformer_dist.data.stages import Timeline

STATE_VERSION = 2
STATE_BYTES = 1024
MAX_QUARANTINED = 32  # documents; more is not a damaged document but a damaged disk

Damage = tuple[int, int]  # number of the store, number of the document in it


@dataclass(frozen=True)
class DataState:
    """The position in the data: under 1 KB as JSON without spaces, and the same on every rank.

    Attributes:
        version: of this record.
        stage: the stage of the next step, from 0.
        next_slot: slots handed out; those that were read ahead do not count.
        seed: of the order.
        global_batch: slots of a step.
        seq_len: tokens of a slot.
        plan_hash: for each stage, what its rows depend on.
        manifest_root: hash of the shards.
        quarantined: for each store, the documents that are left out, ascending.
    """

    version: int
    stage: int
    next_slot: int
    seed: int
    global_batch: int
    seq_len: int
    plan_hash: tuple[str, ...]
    manifest_root: str
    quarantined: tuple[tuple[int, ...], ...]

    @classmethod
    def first(cls, timeline: Timeline) -> DataState:
        """The state before the first step; DataError when stages and sources are too many to record."""
        state = cls(
            version=STATE_VERSION,
            stage=0,
            next_slot=0,
            seed=timeline.seed,
            global_batch=timeline.global_batch,
            seq_len=timeline.seq_len,
            plan_hash=timeline.plan_hashes,
            manifest_root=timeline.manifest_root,
            quarantined=((),) * len(timeline.stores),
        )
        # The largest numbers that it can come to hold.
        largest = ((10**12,) * MAX_QUARANTINED, *state.quarantined[1:])
        record = replace(state, next_slot=10**12, stage=99, quarantined=largest).to_dict()
        size = len(json.dumps(record, separators=(",", ":")))
        if size > STATE_BYTES:
            raise DataError(
                f"{len(state.plan_hash)} stages of {len(timeline.stores)} shards folders need {size} bytes of "
                f"state, more than {STATE_BYTES}; use fewer"
            )
        return state

    @property
    def step(self) -> int:
        """Steps handed out."""
        return self.next_slot // self.global_batch

    def after(self, step: int, timeline: Timeline) -> DataState:
        """The state after ``step``."""
        following = step + 1
        return replace(self, next_slot=following * self.global_batch, stage=timeline.stage_of(following))

    def leave_out(self, damage: Iterable[Damage]) -> DataState:
        """The state with these documents quarantined as well; DataError beyond ``MAX_QUARANTINED``."""
        found = set(damage)
        merged = tuple(
            tuple(sorted({*documents, *(d for s, d in found if s == store)}))
            for store, documents in enumerate(self.quarantined)
        )
        count = sum(len(documents) for documents in merged)
        if count > MAX_QUARANTINED:
            raise DataError(
                f"{count} documents are damaged, more than the {MAX_QUARANTINED} that a run may leave out; "
                "restore the shards (roformer-dist data verify names what is damaged)"
            )
        return replace(self, quarantined=merged)

    @property
    def num_quarantined(self) -> int:
        """Documents that are left out."""
        return sum(len(documents) for documents in self.quarantined)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataState:
        """The inverse of ``to_dict``, also after JSON; DataError for another version or mistyped fields."""
        if values.get("version") != STATE_VERSION:
            raise DataError(
                f"cannot resume: the checkpoint's data state has version {values.get('version')}, this program "
                f"reads {STATE_VERSION}; start a new run"
            )
        names = list(cls.__dataclass_fields__)
        if sorted(values) != sorted(names):
            raise DataError(f"data state has the fields {sorted(values)}, expected {sorted(names)}")
        for name in ("stage", "next_slot", "seed", "global_batch", "seq_len"):
            _check(type(values[name]) is int, name, values, "an integer")
        _check(type(values["manifest_root"]) is str, "manifest_root", values, "text")
        hashes, quarantined = values["plan_hash"], values["quarantined"]
        _check(_is_list_of(hashes, str), "plan_hash", values, "a list of texts")
        lists = _is_list_of(quarantined, (list, tuple)) and all(_is_list_of(q, int) for q in quarantined)
        _check(lists, "quarantined", values, "lists of integers")
        return cls(**{**values, "plan_hash": tuple(hashes), "quarantined": tuple(map(tuple, quarantined))})


def check_same_data(theirs: DataState, ours: DataState) -> None:
    """Raise DataError with both values unless a run at ``ours`` may go on from ``theirs``."""
    for name in ("manifest_root", "plan_hash", "seed", "seq_len", "global_batch"):
        old, new = getattr(theirs, name), getattr(ours, name)
        if old == new:
            continue
        meaning = ""
        if name == "global_batch":
            meaning = f" (tokens_per_step {old * theirs.seq_len} and {new * ours.seq_len})"
        elif name == "plan_hash":
            old, new = " ".join(old), " ".join(new)
        raise DataError(
            f"cannot resume: the checkpoint has {name}={old}, this run has {name}={new}{meaning}; "
            "resume with what it was trained on, or start a new run"
        )
    if theirs.next_slot < 0 or theirs.next_slot % theirs.global_batch:
        raise DataError(
            f"cannot resume: next_slot={theirs.next_slot} is not a multiple of "
            f"global_batch={theirs.global_batch}; the checkpoint's data state is damaged"
        )
    if len(theirs.quarantined) != len(ours.quarantined):
        raise DataError(
            f"cannot resume: the data state quarantines documents of {len(theirs.quarantined)} shards "
            f"folders, this run has {len(ours.quarantined)}; the checkpoint's data state is damaged"
        )


def _is_list_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)


def _check(good: bool, name: str, values: dict[str, Any], expected: str) -> None:
    if not good:
        raise DataError(f"data state has {name}={values[name]!r}, expected {expected}")
