"""The sections that describe a run: its size, optimizer, schedule, and what is written when."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from roformer_dist.config.section import Fraction, Momentum, PositiveFloat, PositiveInt, Section


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
    kernel: Literal["auto", "sdpa", "varlen", "flash_attn", "reference"] = "auto"
    """Attention: PyTorch's flash for CPU (sdpa) or CUDA (varlen), flash-attn 2 on CUDA, or the float64 reference."""
    z_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight of log(Z)^2 in the gradient, which keeps the softmax's normaliser near 1 (PaLM: 1e-4); language models."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Keep a block's input alone and run the block again, or (selective) keep what attention gave as well."""
    activation_offload: bool = False
    """What checkpointing keeps waits in host memory."""
    mlp_tile_tokens: PositiveInt | None = None
    """Tokens of a row that the MLP computes at a time, keeping nothing of its inner width; default: all."""
    compile: bool = False
    """Compile norms and MLPs with torch.compile; needs a compiler, and parameters in one piece (ZeRO 0 to 2)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.activation_offload and self.activation_checkpointing == "none":
            raise ValueError(
                "activation_offload = true moves what checkpointing keeps, and activation_checkpointing is none: "
                'set it to "full" or "selective"'
            )
        if self.compile and self.mlp_tile_tokens is not None:
            raise ValueError(
                f"compile = true and mlp_tile_tokens = {self.mlp_tile_tokens}: a tiled MLP has a backward of its "
                "own, which is not compiled; choose one of them"
            )
        return self


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
    init_from: str | None = None
    """Checkpoint, run or import whose parameters a new run starts from; default: random ones from train.seed."""


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
