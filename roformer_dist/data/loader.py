"""The training loader: batches as a pure function of (seed, plan, step), resumable and elastic.

Step ``k`` of ``B`` rows uses the slots ``[k * B, (k + 1) * B)``. Data-parallel rank ``r`` of ``d``
takes the slots ``r::d`` of that range and cuts them, in order, into micro-batches. So the rows of a
step do not depend on the number of ranks, the micro-batch size or the number of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from roformer_dist.batch import Batch
from roformer_dist.data.errors import DataError
from roformer_dist.data.objective import Objective
from roformer_dist.data.order import rows_of_slots
from roformer_dist.data.plan import Plan
from roformer_dist.data.rows import empty_row, make_batch, make_batches, read_row
from roformer_dist.data.store import ShardStore

STATE_VERSION = 1


@dataclass(frozen=True)
class DataState:
    """Where a training is in its data: under 1 KB, and the same on every rank.

    ``next_slot`` counts rows handed out, not rows read ahead.
    """

    version: int
    next_slot: int
    seed: int
    plan_hash: str
    manifest_root: str
    rows_per_step: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataState:
        """The inverse of ``to_dict``; raises ``DataError`` for missing, unknown or mistyped fields."""
        types = {field.name: int if field.type == "int" else str for field in fields(cls)}
        if set(values) != set(types):
            raise DataError(f"data state has the fields {sorted(values)}, expected {sorted(types)}")
        for name, expected in types.items():
            if type(values[name]) is not expected:
                raise DataError(f"data state has {name}={values[name]!r}, expected {expected.__name__}")
        return cls(**values)


@dataclass(frozen=True)
class StepData:
    """One rank's share of an optimizer step.

    Attributes:
        micro_batches: this rank's batches, ``micro_batch_size`` rows each.
        num_valid: labels that count in the whole step, over all ranks and micro-batches.
        num_tokens: token slots of the whole step, padding included.
        state: the state after this step; loading it continues with the next one.
    """

    micro_batches: list[Batch]
    num_valid: int
    num_tokens: int
    state: DataState


class Loader:
    """An endless iterator over steps; epochs follow each other, also inside a step.

    Args:
        store, plan: the data; they must belong together.
        seed: of the order and of the objective's draws.
        rows_per_step: rows of one optimizer step over all ranks.
        micro_batch_size: rows of one micro-batch of one rank.
        dp_rank, dp_size: which share of each step this loader gives.
        objective: what is predicted.
        workers: threads that prepare steps ahead (at most ``workers + 1`` steps); 0 prepares each
            step when it is asked for. The batches are the same.

    Raises:
        DataError: the plan belongs to other shards, or the numbers do not divide.
    """

    def __init__(
        self,
        store: ShardStore,
        plan: Plan,
        *,
        seed: int,
        rows_per_step: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        objective: Objective,
        workers: int = 0,
    ) -> None:
        plan.check_store(store)
        _check_rank(dp_rank, dp_size, micro_batch_size)
        if rows_per_step < 1 or rows_per_step % (dp_size * micro_batch_size):
            raise DataError(
                f"rows_per_step={rows_per_step} must be a positive multiple of "
                f"dp_size * micro_batch_size = {dp_size} * {micro_batch_size} = {dp_size * micro_batch_size}"
            )
        if workers < 0:
            raise DataError(f"workers={workers} must be 0 or more")
        self._store, self._plan, self._objective = store, plan, objective
        self._micro_batch_size, self._dp_rank, self._dp_size = micro_batch_size, dp_rank, dp_size
        self._state = DataState(STATE_VERSION, 0, seed, plan.hash, store.root, rows_per_step)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader") if workers else None
        self._read_ahead = workers + 1
        self._ahead: deque[Future[StepData]] = deque()

    @property
    def state(self) -> DataState:
        """The state after the last step handed out."""
        return self._state

    def load_state(self, state: DataState) -> None:
        """Continue where ``state`` was taken, on any number of ranks.

        Raises:
            DataError: the state belongs to other data, another seed, step size or version.
        """
        for name in ("version", "manifest_root", "plan_hash", "seed", "rows_per_step"):
            theirs, ours = getattr(state, name), getattr(self._state, name)
            if theirs != ours:
                raise DataError(
                    f"cannot resume: the checkpoint has {name}={theirs}, this run has {name}={ours}; "
                    "resume with what it was trained on, or start a new run"
                )
        if state.next_slot < 0 or state.next_slot % state.rows_per_step:
            raise DataError(
                f"cannot resume: next_slot={state.next_slot} is not a multiple of "
                f"rows_per_step={state.rows_per_step}; the checkpoint's data state is damaged"
            )
        self._forget_ahead()
        self._state = state

    def __iter__(self) -> Iterator[StepData]:
        return self

    def __next__(self) -> StepData:
        """The next step. An error while preparing it is raised here, and again if asked again."""
        if self._pool is None:
            step = self._prepare(self._state.next_slot)
        else:
            while len(self._ahead) < self._read_ahead:
                slot = self._state.next_slot + len(self._ahead) * self._state.rows_per_step
                self._ahead.append(self._pool.submit(self._prepare, slot))
            step = self._ahead[0].result()
            self._ahead.popleft()
        self._state = step.state
        return step

    def close(self) -> None:
        """Stop the workers. Iterating again is an error."""
        self._forget_ahead()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget_ahead(self) -> None:
        while self._ahead:
            self._ahead.pop().cancel()

    def _prepare(self, first_slot: int) -> StepData:
        """The step that starts at ``first_slot``; reads nothing that can change."""
        seed, count = self._state.seed, self._state.rows_per_step
        slots = np.arange(first_slot, first_slot + count)
        rows = rows_of_slots(slots, num_rows=self._plan.num_rows, seed=seed)
        own = slice(self._dp_rank, None, self._dp_size)
        return StepData(
            micro_batches=make_batches(
                (read_row(self._store, self._plan, row) for row in rows[own].tolist()),
                slots[own],
                self._micro_batch_size,
                self._objective,
                seed,
            ),
            num_valid=self._objective.count_valid(self._plan, rows, slots, seed),
            num_tokens=count * self._plan.seq_len,
            state=DataState(
                STATE_VERSION, first_slot + count, seed, self._plan.hash, self._store.root, count
            ),
        )


def evaluation_batches(
    store: ShardStore,
    plan: Plan,
    *,
    rows: int | None,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    objective: Objective,
) -> Iterator[Batch]:
    """This rank's batches of the first ``rows`` rows (None: all) in a fixed order, each row once.

    Every rank yields the same number of batches; rows that are missing to fill them hold padding, in
    which nothing counts. Draws of a masked objective use seed 0 and the row's number as slot.

    Raises:
        DataError: the plan belongs to other shards, or a number is out of range.
    """
    plan.check_store(store)
    _check_rank(dp_rank, dp_size, micro_batch_size)
    if rows is not None and rows < 1:
        raise DataError(f"rows={rows} must be at least 1, or None for all")
    count = plan.num_rows if rows is None else min(rows, plan.num_rows)
    together = dp_size * micro_batch_size
    return _evaluate(store, plan, count, together, slice(dp_rank, None, dp_size), objective)


def _evaluate(
    store: ShardStore, plan: Plan, count: int, together: int, own: slice, objective: Objective
) -> Iterator[Batch]:
    for first in range(0, count, together):
        slots = np.arange(first, first + together)[own]
        rows = [
            read_row(store, plan, slot) if slot < count else empty_row(store, plan) for slot in slots.tolist()
        ]
        yield make_batch(rows, slots, objective, seed=0)


def _check_rank(dp_rank: int, dp_size: int, micro_batch_size: int) -> None:
    if dp_size < 1 or not 0 <= dp_rank < dp_size:
        raise DataError(f"dp_rank={dp_rank} must be at least 0 and below dp_size={dp_size}")
    if micro_batch_size < 1:
        raise DataError(f"micro_batch_size={micro_batch_size} must be at least 1")
