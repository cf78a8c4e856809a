"""The configuration: frozen, strict sections. Every key is read somewhere; unknown keys are errors."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of every section: immutable, no coercion, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class NoScaling(Section):
    """RoPE with the frequencies it was trained with."""

    kind: Literal["none"] = "none"


class LinearScaling(Section):
    """Position interpolation (PI): every frequency divided by ``factor``."""

    kind: Literal["linear"]
    factor: PositiveFloat
    """Target length over trained length."""


class NtkScaling(Section):
    """NTK-aware scaling: the base grows so that the slowest frequency is divided by ``factor``."""

    kind: Literal["ntk"]
    factor: PositiveFloat
    """Target length over trained length."""


class YarnScaling(Section):
    """YaRN: interpolation by wavelength, and a temperature on the attention scores."""

    kind: Literal["yarn"]
    factor: PositiveFloat
    """Target length over trained length."""
    original_seq_len: PositiveInt
    """The length the frequencies were trained at."""
    beta_fast: PositiveFloat = 32.0
    """Pairs that turn more often than this within the trained length are left alone."""
    beta_slow: PositiveFloat = 1.0
    """Pairs that turn less often than this are interpolated in full."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast = {self.beta_fast} must be greater than beta_slow = {self.beta_slow}"
            )
        return self


RopeScaling = Annotated[NoScaling | LinearScaling | NtkScaling | YarnScaling, Field(discriminator="kind")]


class RopeConfig(Section):
    """The rotation that encodes position."""

    theta: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 10000.0
    """Base of the frequencies, ``theta ** (-2 i / head_dim)``."""
    pairing: Literal["interleaved", "half"] = "interleaved"
    """Which dimensions turn together: (2i, 2i+1) as in the paper, or (i, i + head_dim/2) as in Llama."""
    scaling: RopeScaling = NoScaling()
    """How the frequencies are changed for longer contexts."""


class ModelConfig(Section):
    """The network."""

    vocab_size: PositiveInt
    """Rows of the embedding; the tokenizer's size."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_layers: PositiveInt
    """Number of blocks."""
    num_heads: PositiveInt
    """Query heads."""
    num_kv_heads: PositiveInt | None = None
    """Key and value heads (grouped-query attention); default: num_heads."""
    head_dim: PositiveInt | None = None
    """Width of one head; default: hidden_size / num_heads."""
    intermediate_size: PositiveInt
    """Inner width of the MLP."""
    block: Literal["pre_norm", "post_norm"] = "pre_norm"
    """Norm before each sub-layer (as today) or after the residual sum (as in the paper)."""
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """Kind of normalisation."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the variance inside a norm."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Kind of MLP."""
    bias: bool = False
    """Whether linear layers carry a bias."""
    tie_embeddings: bool = True
    """Whether the output layer shares the embedding's weights."""
    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on each sub-layer's output and the embedding, drawn per token from a counter."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Only 0 is accepted: see the error."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; projections into the residual are divided by sqrt(2 layers)."""
    rope: RopeConfig = RopeConfig()
    """Rotary position embedding."""

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not divisible by num_heads = {self.num_heads}; "
                f"set head_dim or change one of them"
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim = {self.head_size} is odd; a rotation needs pairs of dimensions")
        if self.head_size == 2 and self.rope.scaling.kind == "ntk":
            raise ValueError(
                "rope.scaling: ntk needs head_dim > 2; with a single pair there is no base to change"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} is not divisible by num_kv_heads = {self.kv_heads}"
            )
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout = {self.attention_dropout} cannot be honoured: flash kernels draw it from "
                "their own generator, so it would differ between meshes; set it to 0 and use hidden_dropout"
            )
        return self


class CausalObjective(Section):
    """Predict the next token of the document."""

    kind: Literal["causal"] = "causal"


class MaskedObjective(Section):
    """Predict masked tokens from both sides (BERT's 80/10/10 rule)."""

    kind: Literal["masked"]
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens to predict."""
    mask_id: Annotated[int, Field(ge=0)] | None = None
    """The token that stands for a masked one; default: the one that the shards were made with."""


Objective = Annotated[CausalObjective | MaskedObjective, Field(discriminator="kind")]


class SourceConfig(Section):
    """Packed data: shards and the plan made from them."""

    shards: str
    """Directory of shards, written by ``data shards``."""
    plan: str
    """Packing plan, written by ``data pack``."""


class DataConfig(Section):
    """What the model reads."""

    tokenizer: str
    """The sentencepiece model that made the shards."""
    train: SourceConfig
    """What is trained on."""
    validation: SourceConfig
    """What is held out."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Threads that read ahead; 0 reads in the training thread."""


class ParallelConfig(Section):
    """How one model is spread over processes."""

    sp_size: PositiveInt = 1
    """Processes that share one sequence (Ulysses: all-to-all between sequence and heads)."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO: 0 shards nothing, 1 optimizer states, 2 gradients too, 3 parameters too."""


class TrainConfig(Section):
    """The run's size and arithmetic."""

    seq_len: PositiveInt
    """Tokens in a row: the trained context."""
    tokens_per_step: PositiveInt
    """Tokens in one optimizer step, over all processes; a multiple of seq_len."""
    micro_batch_size: PositiveInt = 1
    """Rows that one model replica holds at a time."""
    num_steps: PositiveInt
    """Optimizer steps of the run."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Initialisation, order of the data, dropout and masking."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 keeps fp32 master weights; auto takes bf16 where the processor computes in it, and says so."""
    kernel: Literal["auto", "sdpa", "reference"] = "auto"
    """Attention kernel: PyTorch's CPU flash, or the float64 reference."""


class OptimizerConfig(Section):
    """AdamW."""

    lr: PositiveFloat
    """Peak learning rate."""
    betas: tuple[Momentum, Momentum] = Field(default=(0.9, 0.95), strict=False)
    """Decay of the two moments."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Decoupled decay; matrices only, never norms, biases or embeddings."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""


class CosineSchedule(Section):
    """Warm-up, then half a cosine."""

    kind: Literal["cosine"]
    warmup_steps: Annotated[int, Field(ge=0)]
    """Steps of linear warm-up."""
    min_ratio: Fraction = 0.1
    """Final learning rate over the peak."""


class WsdSchedule(Section):
    """Warm-up, stable, then linear decay."""

    kind: Literal["wsd"]
    warmup_steps: Annotated[int, Field(ge=0)]
    """Steps of linear warm-up."""
    decay_steps: Annotated[int, Field(ge=0)]
    """Steps of linear decay at the end."""
    min_ratio: Fraction = 0.0
    """Final learning rate over the peak."""


class InverseSqrtSchedule(Section):
    """Warm-up, then 1/sqrt(step)."""

    kind: Literal["inverse_sqrt"]
    warmup_steps: PositiveInt
    """Steps of linear warm-up; the decay continues from there."""


Schedule = Annotated[CosineSchedule | WsdSchedule | InverseSqrtSchedule, Field(discriminator="kind")]


class CheckpointConfig(Section):
    """When the run is saved."""

    every_steps: PositiveInt
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 3
    """How many are kept."""
    background: bool = True
    """Write from a snapshot while training goes on."""


class ValidationConfig(Section):
    """Loss on held-out rows, in the loop."""

    every_steps: PositiveInt
    """Steps between validations; the last step is always validated."""
    rows: PositiveInt
    """Rows of the validation plan that are scored (all, if the plan has fewer)."""


class LoggingConfig(Section):
    """What is written down."""

    every_steps: PositiveInt = 10
    """Steps between points in metrics.jsonl and TensorBoard."""


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
        _check_heads(self.model, self.parallel)
        return self


def _nearest(value: int, multiple: int) -> int:
    return max(1, (value + multiple // 2) // multiple) * multiple


def _check_heads(model: ModelConfig, parallel: ParallelConfig) -> None:
    for key, heads in (("num_heads", model.num_heads), ("num_kv_heads", model.kv_heads)):
        if heads % parallel.sp_size:
            divisors = [n for n in range(1, min(model.kv_heads, 1024) + 1) if model.kv_heads % n == 0]
            raise ValueError(
                f"parallel.sp_size = {parallel.sp_size} does not divide model.{key} = {heads}: Ulysses gives "
                f"each process whole heads; sp_size may be one of {divisors}"
            )
