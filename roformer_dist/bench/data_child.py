"""One sample of ``bench data`` for ours: whole epochs of the training loader, every byte checked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from functools import cache
from itertools import islice
from pathlib import Path

from roformer_dist.bench.data_peers import Fields, measure
from roformer_dist.data.loader import Loader
from roformer_dist.data.objective import CausalObjective
from roformer_dist.data.plan import load_plans
from roformer_dist.data.stages import Source, Stage
from roformer_dist.data.store import ShardStore


def epochs_of(shards: str, plan_file: str, batch: int) -> Callable[[], Iterable[Fields]]:
    """What gives the next epoch's batches, as many as fit whole; opened with the first."""

    @cache
    def opened() -> tuple[Loader, int]:
        store, (plan,) = ShardStore(shards), load_plans(plan_file)
        loader = Loader(
            [Stage((Source(store, (plan,)),))],
            seed=0,
            seq_len=plan.seq_len,
            global_batch=batch,
            micro_batch_size=batch,
            dp_rank=0,
            dp_size=1,
            objective=CausalObjective(),
        )
        return loader, plan.num_rows // batch

    def epoch() -> Iterable[Fields]:
        loader, steps = opened()
        for step in islice(loader, steps):
            (found,) = step.micro_batches
            yield found.input_ids, found.labels, found.position_ids

    return epoch


def main(shards: str, plan_file: str, batch: str, epochs: str) -> None:
    """Measure in this process, which must be fresh."""
    files = [*Path(shards).iterdir(), Path(plan_file)]
    print(json.dumps(measure(epochs_of(shards, plan_file, int(batch)), files, int(epochs), "roformer-dist")))


if __name__ == "__main__":
    main(*sys.argv[1:])
