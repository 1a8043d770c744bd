"""What the passes of a step leave on a rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpillm.parallel.pipeline.simulate import Span


@dataclass(frozen=True)
class Passes:
    """The results of a batch's passes on this rank."""

    losses: list[float]
    """The loss of each microbatch where the last stage is, else none."""
    parts: list[list[float]]
    """The parts of these losses, each of all microbatches: those of `StepPlan.loss_parts`."""
    spans: list[Span]
    """When the rank computed."""
    ended: float
    """When the last pass ended and the reduction began, in seconds of perf_counter."""
    summed: float
    """When the reduction of gradients ended, in seconds of perf_counter."""
    squares: list[float]
    """The sums of squares of the gradients that this rank counts, for `clip_`."""
    noise_scale: float | None = None
    """The gradient noise scale in sequences, where it was measured and the gradient is not lost in
    its noise.
    """


def by_part(numbers: Sequence[float], width: int) -> list[list[float]]:
    """Return of `width` numbers a microbatch, one microbatch after another, the lists of each."""
    return [list(numbers[part::width]) for part in range(width)]


def on_host(losses: Sequence[Tensor], squares: Tensor) -> tuple[list[float], list[float]]:
    """Copy both to the host: the one time in a step that it waits for the device."""
    # A rank that counts no gradient has the empty tensor of the CPU.
    squares = squares.to(losses[0].device) if losses else squares
    numbers = (loss.double().view(-1) for loss in losses)
    values: list[float] = torch.cat([squares, *numbers]).tolist()
    return values[len(squares) :], values[: len(squares)]
