"""What must hold on every step, as numbers that ride in the trainer's one small sum over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from roformer_dist.batch import Batch
from roformer_dist.engine.engine import StepResult
from roformer_dist.parallel.invariants import (
    NAMES,
    InvariantError,
    check_checksums,
    checksums,
    norms_agree,
    share,
)
from roformer_dist.parallel.mesh import Mesh

# Checksums of the slices and of the whole batch, then the norm and its square.
COUNT = 2 * len(NAMES) + 2


class StepInvariants:
    """Inputs, labels, positions and the gradient norm of one step on one rank."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._found: tuple[int, ...] = (0,) * len(NAMES)
        self._expected = self._found

    def see(self, whole: Sequence[Batch], local: Sequence[Batch]) -> None:
        """The step's micro-batches before slicing and as the model is given them."""
        sp = self._mesh.sp
        self._found, self._expected = checksums(local), checksums(share(whole, sp.rank, sp.size))

    def numbers(self, result: StepResult | None) -> list[float]:
        """This rank's ``COUNT`` terms of the sum."""
        if result is None:
            return [0.0] * COUNT
        norm = result.grad_norm
        return [*map(float, self._found), *map(float, self._expected), norm, norm * norm]

    def check(self, sums: Sequence[float], result: StepResult, step: int, device: torch.device) -> None:
        """Check the sums over all ranks; every rank comes to the same end.

        Raises:
            InvariantError: one line that names the invariant and both numbers.
        """
        check_checksums(sums[: len(NAMES)], sums[len(NAMES) : 2 * len(NAMES)], step)
        world = self._mesh.world
        if not norms_agree(sums[-2], sums[-1], world.size):
            own = torch.tensor(result.grad_norm, dtype=torch.float64, device=device)
            norms = world.all_gather(own).tolist()
            low, high = (norms.index(pick(norms)) for pick in (min, max))
            raise InvariantError(
                f"step {step}: the gradient norm is {norms[low]:.9g} on rank {low} and {norms[high]:.9g} on rank "
                f"{high}; the ranks do not train one model"
            )


def check_targets(found: int, expected: int, step: int) -> None:
    """InvariantError unless every target of the step was counted by exactly one rank."""
    if found != expected:
        raise InvariantError(
            f"step {step}: the ranks saw {found} targets, the plan has {expected}; "
            "the slices do not cover the batch"
        )
