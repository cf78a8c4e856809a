"""The training loader: batches as a pure function of (seed, plans, step, quarantined), resumable and elastic.

Step ``k`` of ``B`` slots uses the slots ``[k * B, (k + 1) * B)``. Data-parallel rank ``r`` of ``d`` takes
the ``r``-th of ``d`` equal runs of them, in order, as micro-batches. So what is in a step does not depend
on the number of ranks, the micro-batch size or the number of workers, and neighbouring slots of a mixture,
which differ in their source, are on the same rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from roformer_dist.batch import Batch
from roformer_dist.data.errors import DamagedDocument, DataError
from roformer_dist.data.objective import Objective, piece_numbers
from roformer_dist.data.plan import Plan
from roformer_dist.data.rows import Row, empty_row, make_batch, make_batches, read_row, read_rows, step_space
from roformer_dist.data.stages import Part, Stage, Timeline
from roformer_dist.data.state import Damage, DataState, check_same_data
from roformer_dist.data.store import ShardStore

_PREFETCH_STEPS = 4  # at least so many steps before a document is read, its store hears of it


@dataclass(frozen=True)
class StepData:
    """One rank's share of an optimizer step.

    Attributes:
        micro_batches: this rank's batches, ``micro_batch_size`` rows of ``seq_len`` each.
        num_valid: labels that count in the whole step, over all ranks and micro-batches.
        num_tokens: token slots of the whole step, padding included.
        state: the state after this step; loading it continues with the next one.
    """

    micro_batches: list[Batch]
    num_valid: int
    num_tokens: int
    state: DataState


class DamageFound(DataError):
    """Documents that this rank needs for a step are damaged; the message is that of the first.

    Attributes:
        damage: all that the rank's share of the step needs, each once.
    """

    def __init__(self, message: str, damage: tuple[Damage, ...]) -> None:
        super().__init__(message)
        self.damage = damage


class Loader:
    """An endless iterator over steps; epochs follow each other, also inside a step.

    Args:
        stages: what is read; the last stage goes on as long as one asks.
        seed: of the order and of the objective's draws.
        seq_len: tokens of a slot.
        global_batch: slots of one optimizer step over all ranks.
        micro_batch_size: slots of one micro-batch of one rank.
        dp_rank, dp_size: which share of each step this loader gives.
        objective: what is predicted.
        workers: threads that prepare steps ahead (at most ``workers + 1`` steps); 0 prepares each
            step when it is asked for. The batches are the same.

    Raises:
        DataError: data that does not belong together, or numbers that do not divide.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        seed: int,
        seq_len: int,
        global_batch: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        objective: Objective,
        workers: int = 0,
    ) -> None:
        _check_rank(dp_rank, dp_size, micro_batch_size)
        if global_batch < 1 or global_batch % (dp_size * micro_batch_size):
            raise DataError(
                f"global_batch={global_batch} must be a positive multiple of "
                f"dp_size * micro_batch_size = {dp_size} * {micro_batch_size} = {dp_size * micro_batch_size}"
            )
        if workers < 0:
            raise DataError(f"workers={workers} must be 0 or more")
        self._timeline = Timeline(stages, seed=seed, seq_len=seq_len, global_batch=global_batch)
        self._objective, self._micro_batch_size = objective, micro_batch_size
        self._share = global_batch // dp_size
        self._dp_rank = dp_rank
        self._state = DataState.first(self._timeline)
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
            DataError: the state belongs to other data, another seed or step size.
        """
        check_same_data(state, self._state)
        self._forget_ahead()
        self._state = state

    def describe(self, damage: Damage) -> str:
        """Shard and key of a document, in words."""
        store, document = damage
        return self._timeline.stores[store].where(document)

    def __iter__(self) -> Iterator[StepData]:
        return self

    def __next__(self) -> StepData:
        """The next step. An error while preparing it is raised here, and again if asked again.

        Raises:
            DamageFound: after ``load_state(state.leave_out(damage))`` it is given without that damage.
        """
        if self._pool is None:
            step = self._prepare(self._state, self._state.step)
        else:
            while len(self._ahead) < self._read_ahead:
                number = self._state.step + len(self._ahead)
                self._ahead.append(self._pool.submit(self._prepare, self._state, number))
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

    def _prefetch(self, number: int) -> None:
        """Tell the stores which documents this rank reads in step ``number``."""
        if not any(store.is_remote for store in self._timeline.stores):
            return
        for part in self._timeline.parts(number):
            own = (part.slots - number * self._timeline.global_batch) // self._share == self._dp_rank
            pieces = piece_numbers(part.plan, part.rows[own].ravel())
            part.store.prefetch(part.plan.document[pieces])

    def _prepare(self, state: DataState, number: int) -> StepData:
        """Step ``number`` without what ``state`` quarantines; reads nothing that can change."""
        parts = self._timeline.parts(number)
        self._prefetch(number + max(self._read_ahead, _PREFETCH_STEPS))
        first = number * self._timeline.global_batch + self._dp_rank * self._share
        slots = np.arange(first, first + self._share)
        space = step_space(self._share, self._timeline.seq_len)
        rows = self._read(parts, first, space, state)
        return StepData(
            micro_batches=make_batches(
                rows, slots, self._micro_batch_size, self._objective, state.seed, space
            ),
            num_valid=sum(self._count_valid(part, state) for part in parts),
            num_tokens=self._timeline.global_batch * self._timeline.seq_len,
            state=state.after(number, self._timeline),
        )

    def _read(self, parts: Sequence[Part], first: int, space: np.ndarray, state: DataState) -> list[Row]:
        """The rows of the slots from ``first`` on, into ``space``; all damage is found before any is raised."""
        found: dict[Damage, DamagedDocument] = {}
        lengths: list[list[int]] = [[] for _ in range(self._share)]
        for part in parts:
            own = (part.slots >= first) & (part.slots < first + self._share)
            if not own.any():
                continue
            rows, places = part.rows[own], part.slots[own] - first
            per_slot = rows.shape[1]
            of_rows = read_rows(
                part.store,
                part.plan,
                rows.ravel(),
                space[:2].reshape(2, -1, part.plan.seq_len),
                (places[:, None] * per_slot + np.arange(per_slot)).ravel(),
                state.quarantined[part.store_number],
                lambda error, store=part.store_number: found.setdefault((store, error.document), error),
            )
            for number, of_row in enumerate(of_rows):
                lengths[places.item(number // per_slot)] += of_row
        if found:
            damaged = next(iter(found.values()))
            raise DamageFound(str(damaged), tuple(found)) from damaged
        return [Row(space[0, number], space[1, number], of_row) for number, of_row in enumerate(lengths)]

    def _count_valid(self, part: Part, state: DataState) -> int:
        per_slot = part.rows.shape[1]
        places = part.slots[:, None] * per_slot + np.arange(per_slot)
        left_out = state.quarantined[part.store_number]
        return self._objective.count_valid(part.plan, part.rows.ravel(), places.ravel(), state.seed, left_out)


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
