"""The one place where integers are derived from a configuration and a world size."""

from __future__ import annotations

from dataclasses import dataclass

from roformer_dist.config.model import ModelConfig
from roformer_dist.config.parallel import ParallelConfig
from roformer_dist.config.schema import Config, check_mesh


@dataclass(frozen=True)
class RunShape:
    """How a step is spread.

    Attributes:
        world_size: all processes; ``dp_size * sp_size``.
        dp_size: model replicas that read different rows.
        sp_size: processes that share a row; ``ulysses_size * ring_size``.
        ulysses_size: processes that trade slices of the sequence for heads.
        ring_size: processes between which keys and values go round.
        rows_per_step: rows of one optimizer step over all replicas.
        gradient_accumulation_steps: micro-batches of one replica in one step.
        local_seq_len: tokens of a row on one process.
    """

    world_size: int
    dp_size: int
    sp_size: int
    ulysses_size: int
    ring_size: int
    rows_per_step: int
    gradient_accumulation_steps: int
    local_seq_len: int


def derive(config: Config, world_size: int) -> RunShape:
    """Fit ``config`` to ``world_size`` processes; ValueError with the numbers when it does not fit."""
    sp_size, train = config.parallel.sp_size, config.train
    if world_size % sp_size:
        raise ValueError(
            f"parallel.sp_size = {sp_size} does not divide the {world_size} processes started; "
            f"start a multiple of {sp_size} or change sp_size"
        )
    if world_size % config.parallel.hpz_partition_size:
        raise ValueError(
            f"parallel.hpz_partition_size = {config.parallel.hpz_partition_size} does not divide the {world_size} "
            "processes started; set it to the processes of a node, or 1 for none"
        )
    dp_size = world_size // sp_size
    rows = train.tokens_per_step // train.seq_len
    rows_at_once = dp_size * train.micro_batch_size
    if rows % rows_at_once:
        raise ValueError(
            f"train.tokens_per_step = {train.tokens_per_step} makes {rows} rows of {train.seq_len}, which "
            f"{dp_size} replicas x train.micro_batch_size = {train.micro_batch_size} do not divide; "
            f"{max(1, (rows + rows_at_once // 2) // rows_at_once) * rows_at_once * train.seq_len} tokens would fit"
        )
    return RunShape(
        world_size=world_size,
        dp_size=dp_size,
        sp_size=sp_size,
        ulysses_size=config.parallel.ulysses,
        ring_size=config.parallel.ring_size,
        rows_per_step=rows,
        gradient_accumulation_steps=rows // rows_at_once,
        local_seq_len=-(-train.seq_len // sp_size),
    )


def evaluation_mesh(
    model: ModelConfig,
    trained: ParallelConfig | None,
    processes: int,
    *,
    ulysses_size: int | None = None,
    ring_size: int | None = None,
) -> ParallelConfig:
    """How ``processes`` share every row of an evaluation.

    Without sizes: as in training, if it was with as many processes, else Ulysses as far as the heads go and a ring
    for the rest.

    Raises:
        ValueError: the sizes do not make ``processes``, or the model's attention cannot be spread so.
    """
    for option, size in (("--ulysses-size", ulysses_size), ("--ring-size", ring_size)):
        if size is not None and processes % size:
            raise ValueError(
                f"{option} {size} does not divide the {processes} processes that share every row; give one that does"
            )
    if ulysses_size is None and ring_size is None:
        if trained is not None and trained.sp_size == processes:
            ulysses_size = trained.ulysses
        else:
            fitting = range(1, min(processes, model.num_heads) + 1)
            ulysses_size = max(size for size in fitting if processes % size == 0)
    ulysses = ulysses_size or processes // (ring_size or 1)
    ring = ring_size or processes // ulysses
    if ulysses * ring != processes:
        raise ValueError(
            f"--ulysses-size {ulysses} x --ring-size {ring} is {ulysses * ring}, and every row is shared by all "
            f"{processes} processes; give sizes whose product is {processes}"
        )
    mesh = ParallelConfig(sp_size=processes, ulysses_size=ulysses, ring_size=ring)
    check_mesh(model, mesh)
    return mesh
