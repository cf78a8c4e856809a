"""PURE: our configuration as DeepSpeed's dictionary."""

from __future__ import annotations

from typing import Any, Literal

from roformer_dist.config.derive import RunShape
from roformer_dist.config.schema import Config
from roformer_dist.engine.zero import zero_optimization

Precision = Literal["bf16", "fp32"]


def deepspeed_config(
    config: Config, shape: RunShape, precision: Precision, largest_parameter: int = 0
) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``.

    To DeepSpeed every process is a data-parallel rank, so its batch sizes count processes, not replicas.

    Args:
        largest_parameter: elements of the network's largest one, for parameters on a disk.
    """
    check_precision(config.parallel.zero_stage, precision)
    micro, accumulation = config.train.micro_batch_size, shape.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * shape.world_size,
        "zero_optimization": zero_optimization(config.parallel, -(-largest_parameter // shape.world_size)),
        "bf16": {"enabled": precision == "bf16"},
        # Both default to the model's dtype: gradients would add up and be averaged in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        # The kernels of quantized gradients read 16-bit floats whatever they are given.
        "communication_data_type": "fp16" if config.parallel.quantized_gradients else "fp32",
        "gradient_clipping": config.optimizer.max_grad_norm,
        # The optimizer is torch's AdamW, which ZeRO has no entry for in its own list.
        "zero_allow_untested_optimizer": True,
        # Offloaded too: torch's fused AdamW on the CPU, where DeepSpeed's own would be compiled at the start.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def check_precision(zero_stage: int, precision: Precision) -> None:
    """Refuse what DeepSpeed cannot do: without ZeRO it has no fp32 gradients beside bf16 weights."""
    if zero_stage == 0 and precision == "bf16":
        raise ValueError(
            "parallel.zero_stage = 0 with bf16: DeepSpeed then accumulates gradients in bf16; take zero_stage = 1 "
            '(the same arithmetic, with optimizer states sharded) or train.precision = "fp32"'
        )
