"""The learning rate of each step."""

import math

from mpillm.train.optimizers.optimizer import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Return the rate of `step` (from 0) of `steps`: a linear warm-up, then the schedule, down to
    the final share.

    Constant-then-decay is the trapezoid of Hägele et al. 2024; the cosine, with and without warm
    restarts, is that of Loshchilov & Hutter 2017.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    first, last = settings.warmup_steps, steps - 1
    if settings.schedule == "constant-then-decay":
        first = max(first, steps - round(settings.decay_share * steps))
    elif settings.schedule == "cosine-restarts":
        # Free of `steps`: a longer run keeps its cycles, and a shorter one ends within one.
        begin, end = cycle(step - first, settings.period, settings.period_factor)
        first, last = first + begin, first + end - 1
    # 0 until the decay begins, 1 at the last step.
    progress = min(1.0, max(0.0, (step - first) / max(1, last - first)))
    cosine = settings.schedule.startswith("cosine")
    height = 0.5 * (1 + math.cos(math.pi * progress)) if cosine else 1 - progress
    return settings.learning_rate * (settings.final_share + (1 - settings.final_share) * height)


def cycle(step: int, period: int, factor: float) -> tuple[int, int]:
    """Return the first step of the cycle that holds `step` (from 0), and the first of the next.

    The first cycle has `period` steps, each later one `factor` (at least 1) times as many.
    """

    def begin(number: int) -> int:
        # The sum of a geometric series, rounded once: cycles join without a gap.
        growth = (factor**number - 1) / (factor - 1) if factor > 1 else number
        return round(period * growth)

    # The inverse of the sum, in floating point: corrected by whole steps.
    ratio = step / period
    exact = math.log1p(ratio * (factor - 1)) / math.log(factor) if factor > 1 else ratio
    number = int(exact)
    while begin(number) > step:
        number -= 1
    while begin(number + 1) <= step:
        number += 1
    return begin(number), begin(number + 1)
