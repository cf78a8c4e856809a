"""The training data of one rank, and what all ranks do about damage that some of them find in it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from roformer_dist.data.loader import DamageFound, Loader, StepData
from roformer_dist.data.state import MAX_QUARANTINED, Damage, DataState
from roformer_dist.parallel.comm import Comm


class Feed:
    """Hands out steps; under ``quarantine``, damage is kept for ``settle`` instead of raised.

    Attributes:
        damage: documents found damaged in the step that ``read`` could not give.
        wait: seconds spent in ``read`` since this was last set to 0.
    """

    def __init__(self, loader: Loader, *, quarantine: bool) -> None:
        self._loader, self._quarantine = loader, quarantine
        self._before = loader.state
        self.damage: tuple[Damage, ...] = ()
        self.wait = 0.0

    def resume(self, state: DataState) -> None:
        """Go on from ``state``; DataError when it belongs to other data."""
        self._loader.load_state(state)

    def read(self) -> StepData | None:
        """The next step, or None when ``damage`` was found in it; ValueError for one without targets."""
        started = time.perf_counter()
        self._before, self.damage = self._loader.state, ()
        try:
            data = next(self._loader)
        except DamageFound as error:
            if not self._quarantine:
                raise
            self.damage = error.damage
            return None
        finally:
            self.wait += time.perf_counter() - started
        if not data.num_valid:
            raise ValueError(
                f"step {self._before.step + 1} has no target: raise train.tokens_per_step or "
                "objective.mask_probability"
            )
        return data

    def leave_out(self, world: Comm, device: torch.device, say: Callable[[str], None]) -> None:
        """Quarantine, on all ranks alike, what any of them found; the step must be read again.

        Raises:
            DataError: more than a run may leave out; the same on every rank.
        """
        found = _union(self.damage, world, device)
        for damage in found:
            say(
                f"step {self._before.step + 1} · quarantined {self._loader.describe(damage)} is damaged; "
                "from here on its tokens are padding"
            )
        self._loader.load_state(self._before.leave_out(found))


def _union(mine: tuple[Damage, ...], world: Comm, device: torch.device) -> list[Damage]:
    """What any rank found, in order, the same on all; of more than are bearable, at least one too many."""
    table = torch.full((MAX_QUARANTINED + 1, 2), -1, dtype=torch.int64)
    for row, damage in zip(table, mine):
        row[:] = torch.tensor(damage)
    gathered = world.all_gather(table.to(device)).reshape(-1, 2).tolist()
    return sorted({(store, document) for store, document in gathered if store >= 0})
