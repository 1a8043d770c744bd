"""The plots of a report: those that the run has figures for, each with its caption."""

import itertools
import math
from collections.abc import Mapping

import numpy as np

from mpillm.runs.history import object_at
from mpillm.runs.report.downsample import curve
from mpillm.runs.report.drawing import Line, Plot, short
from mpillm.runs.state import RunState
from mpillm.system.console import binary_bytes
from mpillm.system.json_lines import whole_number

WAIT, STEP_SECONDS = "_seconds", "step_seconds"
AXIS_COLOURS = ("a", "b", "c", "d")


def step_plots(run_state: RunState) -> list[Plot]:
    """Collect the plots over the steps; none before the first step."""
    if not run_state.steps.get("step"):
        return []
    found = [
        _loss(run_state),
        _single(run_state, "reward", "reward", "Reward of written answers", "mean"),
        _single(run_state, "kl", "divergence", "Divergence from the reference", "nats a token"),
        _single(run_state, "tokens_per_second", "throughput", "Throughput", "tokens/s"),
        _single(run_state, STEP_SECONDS, "step-time", "Time of a step", "s"),
        _waits(run_state),
        _bubble(run_state),
        _single(run_state, "learning_rate", "learning-rate", "Learning rate", "", smoothed=False),
        _single(run_state, "grad_norm", "gradient-norm", "Norm of the gradient", "before clipping"),
        _memory(run_state),
    ]
    return [plot for plot in found if plot is not None]


def restarts(run_state: RunState) -> tuple[int, ...]:
    """Return the steps from which later attempts continued."""
    return tuple(attempt.first_step for attempt in run_state.attempts[1:])


def axes_with_waits(run_state: RunState) -> list[str]:
    """Return the mesh axes along which waiting was measured."""
    return sorted(
        key.removesuffix(WAIT)
        for key in run_state.steps
        if key.endswith(WAIT) and key != STEP_SECONDS
    )


def _loss(run_state: RunState) -> Plot:
    steps, tests = run_state.steps, run_state.evaluations
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
        marks=restarts(run_state),
        wide=True,
    )


def _single(
    run_state: RunState,
    column: str,
    key: str,
    title: str,
    unit: str,
    scale: float = 1.0,
    smoothed: bool = True,
) -> Plot | None:
    values = run_state.steps.get(column)
    if not values:
        return None
    line = Line(
        title,
        "a",
        curve(run_state.steps["step"]),
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
        key,
        title,
        unit,
        (line,),
        caption + _broken(line),
        from_zero=True,
        marks=restarts(run_state),
    )


def _waits(run_state: RunState) -> Plot | None:
    steps, axes = run_state.steps, axes_with_waits(run_state)
    if not axes or not steps.get(STEP_SECONDS):
        return None
    whole = curve(steps[STEP_SECONDS])
    # The step's time is rank 0's, the waiting is a mean over ranks: in the first step it may be
    # the longer of the two.
    whole[whole <= 0] = np.nan
    lines = [
        Line(
            axis,
            colour,
            curve(steps["step"]),
            np.minimum(100.0, curve(100 * curve(steps[axis + WAIT]) / whole)),
            True,
        )
        for axis, colour in zip(axes, itertools.cycle(AXIS_COLOURS), strict=False)
    ]
    medians = ", ".join(
        f"{line.label} {np.nanmedian(line.y):.1f}%" for line in lines if np.isfinite(line.y).any()
    )
    caption = (
        "Share of a step that a rank waits for messages (mean over ranks). "
        f"Median: {medians}.{_traffic(run_state)}"
    )
    title = "Communication, axis by axis"
    return Plot(
        "communication",
        title,
        "% of the step",
        tuple(lines),
        caption,
        from_zero=True,
        marks=restarts(run_state),
    )


def _traffic(run_state: RunState) -> str:
    facts: Mapping[str, object] = run_state.attempts[-1].facts if run_state.attempts else {}
    traffic = object_at(facts, "traffic")
    found = [
        f"{axis} {binary_bytes(count)}"
        for axis, value in traffic.items()
        if (count := whole_number(value))
    ]
    return f" Bytes of a rank and step, by formula: {', '.join(found)}." if found else ""


def _bubble(run_state: RunState) -> Plot | None:
    return _single(
        run_state, "bubble", "bubble", "Bubble of the pipeline", "% of computing", 1 / 100
    )


def _memory(run_state: RunState) -> Plot | None:
    values = [value for value in run_state.steps.get("memory_bytes", ()) if math.isfinite(value)]
    if not values:
        return None
    size, unit = next(
        ((s, u) for s, u in ((1 << 30, "GiB"), (1 << 20, "MiB")) if max(values) >= s), (1, "bytes")
    )
    return _single(
        run_state,
        "memory_bytes",
        "memory",
        "Memory of the largest rank",
        unit,
        size,
        smoothed=False,
    )


def _broken(line: Line) -> str:
    count = int(np.isnan(line.y).sum()) if line.complete else 0
    return f" {count:,} of {len(line.y):,} steps had no finite value (crosses)." if count else ""
