"""The learning rate of each step."""

import math

from mpillm.train.optimizers.optimizer import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Return the rate of `step` (from 0) of `steps`: a linear warm-up, then the schedule, down to
    the final share.

    Constant-then-decay is the trapezoid of Hägele et al. 2024; the cosine is that of Loshchilov &
    Hutter 2017.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    first = settings.warmup_steps
    if settings.schedule == "constant-then-decay":
        first = max(first, steps - round(settings.decay_share * steps))
    # 0 until the decay begins, 1 at the last step.
    progress = min(1.0, max(0.0, (step - first) / max(1, steps - 1 - first)))
    cosine = settings.schedule == "cosine"
    height = 0.5 * (1 + math.cos(math.pi * progress)) if cosine else 1 - progress
    return settings.learning_rate * (settings.final_share + (1 - settings.final_share) * height)
