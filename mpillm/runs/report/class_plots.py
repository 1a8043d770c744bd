"""Plots of classes on axes of matplotlib: for the report's page, and for a file of their own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.system.atomic import replacing

CONFUSION, RELIABILITY = "confusion-matrix", "reliability"
# Of a row of the table: see tasks/metrics/calibration.py.
RELIABILITY_COLUMNS = 4
# Numbers in more cells, and names of more classes, overlap.
MOST_NUMBERED, MOST_NAMED = 12, 40
Table = Sequence[Sequence[float]]


def reliability_points(rows: Table) -> list[tuple[float, float, float]]:
    """Return (mean probability, share that is right, count) of each bin; none of another table."""
    if not rows or len(rows[0]) != RELIABILITY_COLUMNS or not sum(row[1] for row in rows) > 0:
        return []
    return [(row[2], row[3], row[1]) for row in rows]


def fill_reliability(
    axes: Any, points: Sequence[tuple[float, float, float]], ink: str, colour: str
) -> None:
    """Draw the share that is right over the mean probability; a dot's area is the bin's count."""
    largest = max(count for _, _, count in points)
    axes.plot([0, 1], [0, 1], color=ink, linewidth=0.8, linestyle="--")
    x, y, counts = (np.array(column) for column in zip(*points, strict=True))
    axes.plot(x, y, color=colour, linewidth=1.2)
    # A bin of few targets stays visible.
    areas = 6 + 90 * counts / largest
    axes.scatter(x, y, s=areas, color=colour, clip_on=False, zorder=5)
    axes.set(xlabel="mean probability", ylabel="share that is right")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)


def fill_confusion(axes: Any, counts: Table, classes: Sequence[str]) -> None:
    """Draw a line for each class of the targets, coloured by the shares of the classes found."""
    counts_VV = np.array(counts, float)
    shares_VV = counts_VV / np.maximum(counts_VV.sum(1, keepdims=True), 1)
    axes.imshow(shares_VV, cmap="Blues", vmin=0, vmax=1)
    numbers = range(len(counts_VV))
    if len(numbers) <= MOST_NAMED:
        # The names are a user's: matplotlib reads formulas between two dollar signs.
        names = [name.replace("$", r"\$") for name in classes] or [str(n) for n in numbers]
        axes.set_xticks(numbers, names, rotation=45 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(numbers, names)
    axes.set(xlabel="found", ylabel="class")
    if len(numbers) <= MOST_NUMBERED:
        for row in numbers:
            for column in numbers:
                light = shares_VV[row, column] > 0.5
                count = f"{counts_VV[row, column]:,.0f}"
                style = {"ha": "center", "va": "center", "color": "white" if light else "black"}
                axes.text(column, row, count, **style)


def draw_classes(
    tables: Mapping[str, Mapping[str, Table]], classes: Sequence[str], path: Path
) -> None:
    """Draw both plots of each model, a line a model, as a PNG, SVG or PDF file at `path`.

    `tables`: of each model by the metric. A model without them has no line. Raises OSError.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {name: each for name, each in tables.items() if each.get(RELIABILITY)}
    figure = Figure(figsize=(10, 4.8 * max(1, len(shown))), layout="constrained")
    FigureCanvasAgg(figure)
    lines = figure.subplots(max(1, len(shown)), 2, squeeze=False)
    for (name, each), (left, right) in zip(shown.items(), lines, strict=False):
        left.set_title(f"reliability of {name}")
        if points := reliability_points(each[RELIABILITY]):
            fill_reliability(left, points, "black", "tab:blue")
        right.set_title(f"confusion matrix of {name}")
        fill_confusion(right, each[CONFUSION], classes)
    # A date in the file would make each one another.
    kind = path.suffix.lower().removeprefix(".")
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=120, metadata=dates.get(kind))
