"""Which plots a report has: those that the run has figures for, each with its caption."""

import math
from collections.abc import Mapping

import numpy as np

from mpillm.runs.history import object_at
from mpillm.runs.report.downsample import curve
from mpillm.runs.report.drawing import Line, Plot, short
from mpillm.runs.state import RunState
from mpillm.system.console import binary_bytes

WAIT, STEP_SECONDS = "_seconds", "step_seconds"
AXIS_COLOURS = ("a", "b", "c", "d")


def plots(standing: RunState) -> list[Plot]:
    """The plots over the steps; none before the first step."""
    if not standing.steps.get("step"):
        return []
    found = [
        _loss(standing),
        _single(standing, "tokens_per_second", "throughput", "Throughput", "tokens/s"),
        _single(standing, STEP_SECONDS, "step-time", "Time of a step", "s"),
        _waits(standing),
        _bubble(standing),
        _single(standing, "learning_rate", "learning-rate", "Learning rate", "", smoothed=False),
        _single(standing, "grad_norm", "gradient-norm", "Norm of the gradient", "before clipping"),
        _memory(standing),
    ]
    return [plot for plot in found if plot is not None]


def restarts(standing: RunState) -> tuple[int, ...]:
    """The steps from which later attempts went on."""
    return tuple(attempt.first_step for attempt in standing.attempts[1:])


def axes_with_waits(standing: RunState) -> list[str]:
    """The mesh axes along which waiting was measured."""
    return sorted(
        key.removesuffix(WAIT)
        for key in standing.steps
        if key.endswith(WAIT) and key != STEP_SECONDS
    )


def _loss(standing: RunState) -> Plot:
    steps, tests = standing.steps, standing.evaluations
    losses = steps.get("loss", [math.nan] * len(steps["step"]))
    training = Line(
        "training", "a", curve(steps["step"]), curve(losses), smoothed=True, complete=True
    )
    lines = [training]
    if tests.get("validation_loss"):
        lines.append(Line("validation", "b", curve(tests["step"]), curve(tests["validation_loss"])))
    caption = "; ".join(
        f"{line.label} {line.y[-1]:.4f} at step {line.x[-1]:,.0f}"
        for line in lines
        if np.isfinite(line.y[-1])
    )
    caption = f"At the end: {caption}." if caption else ""
    return Plot(
        "loss",
        "Loss",
        "nats a token",
        tuple(lines),
        caption + _broken(training),
        marks=restarts(standing),
        wide=True,
    )


def _single(
    standing: RunState,
    column: str,
    key: str,
    title: str,
    unit: str,
    scale: float = 1.0,
    smoothed: bool = True,
) -> Plot | None:
    values = standing.steps.get(column)
    if not values:
        return None
    line = Line(
        title,
        "a",
        curve(standing.steps["step"]),
        curve(values) / scale,
        smoothed,
        complete=column == "grad_norm",
    )
    there = line.y[np.isfinite(line.y)]
    caption = (
        f"Median {short(float(np.median(there)))}, highest {short(float(there.max()))}."
        if smoothed and len(there)
        else ""
    )
    return Plot(
        key, title, unit, (line,), caption + _broken(line), from_zero=True, marks=restarts(standing)
    )


def _waits(standing: RunState) -> Plot | None:
    steps, axes = standing.steps, axes_with_waits(standing)
    if not axes or not steps.get(STEP_SECONDS):
        return None
    whole = curve(steps[STEP_SECONDS])
    # The step is rank 0's, the waiting a mean of all: at the first step others may wait for longer than it takes.
    whole[whole <= 0] = np.nan
    lines = [
        Line(
            axis,
            colour,
            curve(steps["step"]),
            np.minimum(100.0, curve(100 * curve(steps[axis + WAIT]) / whole)),
            True,
        )
        for axis, colour in zip(axes, AXIS_COLOURS, strict=False)
    ]
    medians = ", ".join(
        f"{line.label} {np.nanmedian(line.y):.1f}%" for line in lines if np.isfinite(line.y).any()
    )
    caption = f"Time that a rank waits for messages, of the step's (mean over ranks). Median: {medians}.{_traffic(standing)}"
    title = "Communication, axis by axis"
    return Plot(
        "communication",
        title,
        "% of the step",
        tuple(lines),
        caption,
        from_zero=True,
        marks=restarts(standing),
    )


def _traffic(standing: RunState) -> str:
    facts: Mapping[str, object] = standing.attempts[-1].facts if standing.attempts else {}
    traffic = object_at(facts, "traffic")
    told = [
        f"{axis} {binary_bytes(count)}"
        for axis, count in traffic.items()
        if isinstance(count, int | float) and count
    ]
    return f" Bytes of a rank and step, by formula: {', '.join(told)}." if told else ""


def _bubble(standing: RunState) -> Plot | None:
    return _single(
        standing, "bubble", "bubble", "Bubble of the pipeline", "% of computing", 1 / 100
    )


def _memory(standing: RunState) -> Plot | None:
    values = [value for value in standing.steps.get("memory_bytes", ()) if math.isfinite(value)]
    if not values:
        return None
    size, unit = next(
        ((s, u) for s, u in ((1 << 30, "GiB"), (1 << 20, "MiB")) if max(values) >= s), (1, "bytes")
    )
    return _single(
        standing, "memory_bytes", "memory", "Memory of the largest rank", unit, size, smoothed=False
    )


def _broken(line: Line) -> str:
    count = int(np.isnan(line.y).sum()) if line.complete else 0
    return f" {count:,} of {len(line.y):,} steps had no finite value (crosses)." if count else ""
