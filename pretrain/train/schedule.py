"""What changes with the step, as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from pretrain.config import EmaTeacher, OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Linear warm-up, then cosine to zero or constant. `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def ema_momentum(config: EmaTeacher, step: int, num_steps: int) -> float:
    """Linear from `momentum_start` at step 0 to `momentum_end` at the last step."""
    progress = step / max(1, num_steps - 1)
    return config.momentum_start + (config.momentum_end - config.momentum_start) * progress
