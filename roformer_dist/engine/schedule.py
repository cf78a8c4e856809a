"""PURE: step -> learning rate."""

from __future__ import annotations

import math

from roformer_dist.config.schema import Config
from roformer_dist.config.training import CosineSchedule, InverseSqrtSchedule, WsdSchedule


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of the optimizer step that follows ``step`` finished ones.

    Warm-up is linear and reaches the peak at its last step; cosine and WSD end at ``min_ratio`` times
    the peak on the run's last step.
    """
    peak, schedule, num_steps = config.optimizer.lr, config.schedule, config.train.num_steps
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    match schedule:
        case CosineSchedule():
            done = _share(step - schedule.warmup_steps, num_steps - schedule.warmup_steps)
            shape = 0.5 * (1 + math.cos(math.pi * done))
            return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * shape)
        case WsdSchedule():
            done = _share(step - (num_steps - schedule.decay_steps), schedule.decay_steps)
            return peak * (1 - (1 - schedule.min_ratio) * done)
        case InverseSqrtSchedule():
            return peak * math.sqrt(schedule.warmup_steps / (step + 1))


def _share(index: int, count: int) -> float:
    """How much of ``count`` steps is over at the step with this index; 1 at the last one."""
    return min(max(index + 1, 0) / count, 1.0) if count else 0.0
