"""AdamW's settings and its rate at each step: plain numbers, so that a recipe is read without torch."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

Share = Annotated[float, Ge(0), Le(1)]
Beta = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov & Hutter 2019): decay acts on matrices alone, apart from the gradient."""

    learning_rate: Annotated[float, Gt(0)] = 1e-3
    schedule: Literal["cosine", "linear", "constant-then-decay"] = "cosine"
    warmup_steps: Annotated[int, Ge(0)] = 100
    decay_share: Share = 0.2
    """constant-then-decay: the share of all steps, at the end, over which the rate falls."""
    final_share: Share = 0.1
    """The rate at the last step, as a share of `learning_rate`."""
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    epsilon: Annotated[float, Gt(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 0.1
    clip: Annotated[float, Ge(0)] = 1.0
    """The largest global norm of the gradients; 0: no clipping."""


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """The rate of `step` (counted from 0) of `steps`: a linear warm-up, then the schedule, down to the final share.

    Constant-then-decay is the trapezoid of Hägele et al. 2024; the cosine is that of Loshchilov & Hutter 2017.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    first = settings.warmup_steps
    if settings.schedule == "constant-then-decay":
        first = max(first, steps - round(settings.decay_share * steps))
    # 0 until the decay begins, 1 at the last step.
    progress = min(1.0, max(0.0, (step - first) / max(1, steps - 1 - first)))
    height = (
        0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1 - progress
    )
    return settings.learning_rate * (settings.final_share + (1 - settings.final_share) * height)
