"""PURE: our configuration as DeepSpeed's dictionary."""

from __future__ import annotations

from typing import Any, Literal

from roformer_dist.config.derive import RunShape
from roformer_dist.config.schema import Config

Precision = Literal["bf16", "fp32"]


def deepspeed_config(config: Config, shape: RunShape, precision: Precision) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``.

    To DeepSpeed every process is a data-parallel rank, so its batch sizes count processes, not replicas.
    """
    check_precision(config.parallel.zero_stage, precision)
    micro, accumulation = config.train.micro_batch_size, shape.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * shape.world_size,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "bf16": {"enabled": precision == "bf16"},
        # Both default to the model's dtype: gradients would add up and be averaged in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": config.optimizer.max_grad_norm,
        # The optimizer is torch's AdamW, which ZeRO has no entry for in its own list.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def check_precision(zero_stage: int, precision: Precision) -> None:
    """Refuse what DeepSpeed cannot do: without ZeRO it has no fp32 gradients beside bf16 weights."""
    if zero_stage == 0 and precision == "bf16":
        raise ValueError(
            "parallel.zero_stage = 0 with bf16: DeepSpeed then accumulates gradients in bf16; take zero_stage = 1 "
            '(the same arithmetic, with optimizer states sharded) or train.precision = "fp32"'
        )
