"""The configuration as a whole, and what must fit between its sections."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from roformer_dist.config.data import (
    CausalObjective,
    ClassificationObjective,
    DataConfig,
    MaskedObjective,
    Objective,
)
from roformer_dist.config.layers import LearnedPosition
from roformer_dist.config.model import ModelConfig
from roformer_dist.config.parallel import ParallelConfig
from roformer_dist.config.section import Section
from roformer_dist.config.training import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    Schedule,
    TrainConfig,
    ValidationConfig,
    WsdSchedule,
)


class Config(Section):
    """A training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
    """Name of the run; its directory is runs/NAME unless --run-dir says otherwise."""
    model: ModelConfig
    objective: Objective = CausalObjective()
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: Schedule
    checkpoint: CheckpointConfig
    validation: ValidationConfig
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        train, schedule = self.train, self.schedule
        if train.tokens_per_step % train.seq_len:
            raise ValueError(
                f"train.tokens_per_step = {train.tokens_per_step} is not a multiple of "
                f"train.seq_len = {train.seq_len}; the nearest is {_nearest(train.tokens_per_step, train.seq_len)}"
            )
        decay = schedule.decay_steps if isinstance(schedule, WsdSchedule) else 0
        if schedule.warmup_steps + decay > train.num_steps:
            raise ValueError(
                f"schedule: {schedule.warmup_steps} warm-up and {decay} decay steps do not fit "
                f"into train.num_steps = {train.num_steps}"
            )
        if (
            isinstance(self.objective, MaskedObjective)
            and (self.objective.mask_id or 0) >= self.model.vocab_size
        ):
            raise ValueError(
                f"objective.mask_id = {self.objective.mask_id} is outside "
                f"model.vocab_size = {self.model.vocab_size}"
            )
        _check_stages(self.data, train)
        check_mesh(self.model, self.parallel)
        check_embedding(self.model, self.objective)
        if train.compile and self.parallel.zero_stage == 3:
            raise ValueError(
                "train.compile = true with parallel.zero_stage = 3: parameters are gathered by hooks inside the "
                "compiled modules; take zero_stage 2 or compile = false"
            )
        if train.precision == "bf16" and self.parallel.zero_stage == 0:
            raise ValueError(
                "parallel.zero_stage = 0 with train.precision = 'bf16': DeepSpeed then accumulates gradients in bf16; "
                "take zero_stage = 1 (the same arithmetic, with optimizer states sharded) or train.precision = 'fp32'"
            )
        if train.z_loss and self.objective.kind == "classification":
            raise ValueError(
                f"train.z_loss = {train.z_loss} is a language model's; set it to 0 for a classification"
            )
        _check_positions(self.model, self.objective, train.seq_len)
        return self


class Description(Section):
    """What a checkpoint that holds parameters alone says of itself."""

    model: ModelConfig
    objective: Objective
    """What it was trained for."""

    @model_validator(mode="after")
    def _check_description(self) -> Self:
        check_embedding(self.model, self.objective)
        return self


def _nearest(value: int, multiple: int) -> int:
    return max(1, (value + multiple // 2) // multiple) * multiple


def check_mesh(model: ModelConfig, parallel: ParallelConfig) -> None:
    """ValueError where the attention of ``model`` cannot be spread as ``parallel`` says."""
    _check_heads(model, parallel)
    _check_forms(model, parallel)


def check_embedding(model: ModelConfig, objective: Objective) -> None:
    """ValueError where an output layer cannot share the embedding's weights, because their widths differ."""
    if isinstance(objective, ClassificationObjective) or not model.tie_embeddings:
        return
    transformed = model.transforms_head(masked=isinstance(objective, MaskedObjective))
    if model.embedding_width != model.hidden_size and not transformed:
        raise ValueError(
            f"model.embedding_size = {model.embedding_size} is not model.hidden_size = {model.hidden_size}, so the "
            "output layer cannot be tied to it; set model.head_transform = true or model.tie_embeddings = false"
        )


def _check_positions(model: ModelConfig, objective: Objective, seq_len: int) -> None:
    if isinstance(model.position, LearnedPosition) and model.position.max_seq_len < seq_len:
        raise ValueError(
            f"train.seq_len = {seq_len} is longer than model.position.max_seq_len = {model.position.max_seq_len}, "
            "the positions that have learned vectors; raise it or shorten the rows"
        )
    if model.rope.policy.kind != "plain" and not isinstance(objective, CausalObjective):
        raise ValueError(
            f"model.rope.policy = {model.rope.policy.kind!r} tells near keys from those far behind, and "
            f"objective.kind = {objective.kind!r} sees keys ahead too; use the causal objective or the plain policy"
        )


def _check_forms(model: ModelConfig, parallel: ParallelConfig) -> None:
    ring = parallel.ring_size
    if ring == 1:
        return
    policy, position = model.rope.policy.kind, model.position.kind
    if policy != "plain":
        refused = f"model.rope.policy = {policy!r}"
    elif position in ("relative_bias", "alibi"):
        refused = f"model.position.kind = {position!r}"
    else:
        return
    raise ValueError(
        f"{refused} needs all keys of a head in one process, and a ring (parallel: ring_size = {ring}) "
        "spreads them; set ring_size = 1 and share the sequence by ulysses_size"
    )


def _check_stages(data: DataConfig, train: TrainConfig) -> None:
    given = [stage.num_steps for stage in data.training]
    steps = sum(steps or 0 for steps in given)
    rest = given[-1] is None
    if (steps >= train.num_steps) if rest else (steps != train.num_steps):
        raise ValueError(
            f"data.stages have {steps} steps{' before the last' if rest else ''}, train.num_steps = "
            f"{train.num_steps}; {'leave some for the last stage' if rest else 'they must be equal'}"
        )


def _check_heads(model: ModelConfig, parallel: ParallelConfig) -> None:
    if parallel.ulysses > model.num_heads:
        raise ValueError(
            f"parallel: ulysses_size = {parallel.ulysses} is more than model.num_heads = {model.num_heads}, and "
            "Ulysses gives each process at least one head; spread the rest over parallel.ring_size"
        )
    fewest = model.num_heads // parallel.ulysses
    if parallel.head_chunks > fewest:
        raise ValueError(
            f"parallel.head_chunks = {parallel.head_chunks} is more than the {fewest} heads that each of "
            f"{parallel.ulysses} processes has of model.num_heads = {model.num_heads}; at most {fewest} would fit"
        )
