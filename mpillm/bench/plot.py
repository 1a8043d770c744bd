"""Draw bandwidth over size: a line an algorithm, the memory floor dashed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpillm.bench import statistics
from mpillm.bench.competitors import FLOOR
from mpillm.bench.results import Row, Section
from mpillm.system.atomic import replacing
from mpillm.system.console import binary_bytes

# The key whose values separate the lines of a picture.
LINE_OF = {
    "memory": "kernel",
    "latency": "level",
    "bandwidth": "level",
    "bibw": "level",
    "message-rate": "level",
}
Line = list[tuple[int, float]]


def lines_of(section: Section, ranks: int) -> dict[str, Line]:
    """Map each line's name to its (bytes, GB/s); empty for a benchmark without sizes in bytes."""
    lines: dict[str, Line] = {}
    for row in section.rows:
        name, speed = _point(section.what, row, ranks)
        if name and speed and row.get("bytes"):
            lines.setdefault(name, []).append((row["bytes"], speed / 1e9))
    return lines


def _point(what: str, row: Row, ranks: int) -> tuple[str, float]:
    if what in LINE_OF:
        return row[LINE_OF[what]], row["bytes_per_second"]
    if "algorithm_bytes_per_second" not in row:
        return "", 0.0
    if row["algorithm"] != FLOOR:
        return row["algorithm"], row["algorithm_bytes_per_second"]
    share = statistics.floor_share(row["operation"], ranks)
    return "memory floor", row["algorithm_bytes_per_second"] / share if share and ranks > 1 else 0.0


def drawn(sections: Sequence[Section], ranks: int) -> list[tuple[str, dict[str, Line]]]:
    """Give (title, lines) of each benchmark that makes a picture."""
    found = [(section.title, lines_of(section, ranks)) for section in sections]
    return [(title, lines) for title, lines in found if lines]


def draw_bandwidth(sections: Sequence[Section], ranks: int, path: Path) -> None:
    """Write the picture, PNG, one panel a benchmark that `drawn` finds, at least one.

    Raises OSError.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = drawn(sections, ranks)
    figure = Figure(figsize=(9, 4.5 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(panels), squeeze=False)
    for (title, lines), axis in zip(panels, axes[:, 0], strict=True):
        for name, points in lines.items():
            style = (
                {"color": "black", "linestyle": "--"}
                if name == "memory floor"
                else {"marker": "o", "markersize": 3}
            )
            axis.plot(*zip(*points, strict=True), label=name, **style)
        axis.set(yscale="log", xlabel="size of the array", ylabel="GB/s", title=title)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda nbytes, _: binary_bytes(nbytes).replace(".0 ", " "))
        axis.grid(alpha=0.3)
        # Right of the axes: inside them the legend would cover a line.
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
