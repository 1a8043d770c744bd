"""The report's plots: SVG that takes colours and type from its page, light or dark."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mpillm.runs.history import Attempt
from mpillm.runs.report.class_plots import fill_reliability
from mpillm.runs.report.downsample import FEWEST_TO_SMOOTH, MOST_POINTS, Curve, smooth, thin

# matplotlib draws in these placeholders; each becomes a variable of the page's style.
PLACEHOLDERS: Mapping[str, str] = MappingProxyType(
    {
        name: f"#0a0b{number:02x}"
        for number, name in enumerate(
            (
                "ink",
                "grid",
                "a",
                "b",
                "c",
                "d",
                "finished",
                "running",
                "stopped",
                "failed",
                "killed",
            ),
            1,
        )
    }
)
# Points at 72 to an inch, the page's pixels.
NARROW, WIDE, HEIGHT, TALL = 520, 1080, 250, 300
# The left, right, lower and upper side, in the same points.
MARGINS = (62, 14, 34, 8)
LABEL = 10
# Up to this number of points each gets a dot: a line of one point has no length.
FEW = 30
# Largest over median from which only a logarithmic axis shows both.
STEEP = 20.0
# More marks than these make the picture grey.
MOST_MARKS, MOST_NUMBERED = 200, 25
ENDS: Mapping[str, str] = MappingProxyType(
    {"finished": "o", "running": ">", "stopped": "s", "failed": "X", "killed": "x"}
)
_RC: Mapping[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.0,
    "axes.edgecolor": PLACEHOLDERS["grid"],
    "axes.labelcolor": PLACEHOLDERS["ink"],
    "text.color": PLACEHOLDERS["ink"],
    "xtick.color": PLACEHOLDERS["ink"],
    "ytick.color": PLACEHOLDERS["ink"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Line:
    label: str
    colour: str
    """A key of PLACEHOLDERS."""
    x: Curve
    y: Curve
    smoothed: bool = False
    """Draw the values faintly, and their median over some steps in front."""
    complete: bool = False
    """Each step has a value: a cross marks one that is not finite."""


@dataclass(frozen=True)
class Plot:
    key: str
    """A word of small letters, unique on the page."""
    title: str
    unit: str
    lines: tuple[Line, ...]
    caption: str = ""
    from_zero: bool = False
    marks: tuple[int, ...] = ()
    """Steps at which an attempt continued from a checkpoint."""
    wide: bool = False


def draw_plot(plot: Plot) -> Markup:
    """Draw a plot over the steps as one <svg>."""

    def fill(axes: Any) -> None:
        for line in plot.lines:
            _draw_line(axes, line)
        steps = np.concatenate([line.x for line in plot.lines])
        _scale(axes, plot, float(steps.min()), float(steps.max()))
        axes.set(xlabel="step", ylabel=plot.unit)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        _draw_marks(axes, plot.marks)
        for line in plot.lines:
            _draw_gaps(axes, line)

    return _svg(
        plot.key, plot.title, (WIDE if plot.wide else NARROW, TALL if plot.wide else HEIGHT), fill
    )


def draw_attempts(attempts: Sequence[Attempt], goal: int) -> Markup:
    """Draw steps over wall time as one <svg>.

    Each attempt is a band with its end; a line to the next one shows the steps lost between them.
    """
    begin = attempts[0].began
    longest = max((attempt.ended - begin).total_seconds() for attempt in attempts)
    unit, size = next(
        (u for u in (("days", 86400), ("hours", 3600), ("minutes", 60)) if longest > 3 * u[1]),
        ("seconds", 1),
    )

    def fill(axes: Any) -> None:
        before: tuple[float, int] | None = None
        for attempt in attempts:
            colour = PLACEHOLDERS[attempt.how]
            points = [(attempt.began, attempt.first_step)]
            points += [(event.time, event.step) for event in attempt.saved]
            points.append((attempt.ended, attempt.last_step))
            x = [(time - begin).total_seconds() / size for time, _ in points]
            y = [step for _, step in points]
            axes.axvspan(x[0], x[-1], color=colour, alpha=0.14, linewidth=0)
            if before is not None:
                axes.plot(
                    [before[0], x[0]],
                    [before[1], y[0]],
                    color=PLACEHOLDERS["ink"],
                    linewidth=0.8,
                    linestyle=":",
                )
            axes.plot(x, y, color=PLACEHOLDERS["a"], linewidth=1.8)
            axes.plot(
                x[1:-1],
                y[1:-1],
                color=PLACEHOLDERS["a"],
                linestyle="none",
                marker="o",
                markersize=3,
            )
            axes.plot(
                x[-1:],
                y[-1:],
                color=colour,
                marker=ENDS[attempt.how],
                markersize=7,
                clip_on=False,
                zorder=5,
            )
            before = (x[-1], y[-1])
        if goal:
            axes.axhline(goal, color=PLACEHOLDERS["ink"], linewidth=0.8, linestyle="--")
        axes.set(xlabel=f"{unit} since the first start", ylabel="step")
        axes.set_ylim(0, max(goal, *(attempt.last_step for attempt in attempts), 1) * 1.06)
        axes.set_xlim(0, max(longest / size, 1e-9) * 1.01)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))

    return _svg("attempts", "Steps over time, attempt by attempt", (WIDE, HEIGHT), fill)


def draw_reliability(points: Sequence[tuple[float, float, float]]) -> Markup:
    """Draw bins of probabilities as one <svg>: (mean probability, share that is right, count)."""

    def fill(axes: Any) -> None:
        fill_reliability(axes, points, PLACEHOLDERS["ink"], PLACEHOLDERS["a"])

    return _svg("reliability", "Share that is right, by probability", (NARROW, HEIGHT), fill)


def short(value: float) -> str:
    """Write 1,234,567 as `1.23M` and 0.00012 as `0.00012`."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _draw_line(axes: Any, line: Line) -> None:
    colour = PLACEHOLDERS[line.colour]
    count = int(np.isfinite(line.y).sum())
    x, y = thin(line.x, line.y)
    if line.smoothed and count >= FEWEST_TO_SMOOTH:
        axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.4 if count <= MOST_POINTS else 0.25)
        x, y = smooth(line.x, line.y)
    axes.plot(
        x, y, color=colour, linewidth=1.6, marker="o" if count <= FEW else None, markersize=3.5
    )


def _scale(axes: Any, plot: Plot, first: float, last: float) -> None:
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in plot.lines])
    if len(values) and values.min() > 0 and values.max() > STEEP * np.median(values):
        axes.set_yscale("log")
    elif plot.from_zero:
        top = float(values.max()) if len(values) else 1.0
        axes.set_ylim(0, top * 1.06 if top > 0 else 1.0)
    margin = max(last - first, 1) * 0.01
    axes.set_xlim(first - margin, last + margin)


def _draw_marks(axes: Any, marks: Sequence[int]) -> None:
    """Draw a line where an attempt began, with its number if there are few."""
    for number, step in enumerate(marks[:MOST_MARKS], 2):
        axes.axvline(step + 0.5, color=PLACEHOLDERS["ink"], linewidth=0.8, linestyle=":", alpha=0.8)
        if len(marks) <= MOST_NUMBERED:
            place = {"xy": (step + 0.5, 1), "xycoords": ("data", "axes fraction")}
            axes.annotate(
                str(number),
                **place,
                xytext=(3, -8),
                textcoords="offset points",
                fontsize=8,
                clip_on=True,
            )


def _draw_gaps(axes: Any, line: Line) -> None:
    """Draw crosses on the lower edge where a value was not finite."""
    gaps = line.x[np.isnan(line.y)]
    if line.complete and len(gaps):
        chosen = gaps[np.unique(np.linspace(0, len(gaps) - 1, MOST_MARKS).astype(int))]
        axes.plot(
            chosen,
            np.zeros(len(chosen)),
            color=PLACEHOLDERS["failed"],
            linestyle="none",
            marker="x",
            markersize=5,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )


def _svg(key: str, title: str, size: tuple[int, int], fill: Callable[[Any], None]) -> Markup:
    with mpl.rc_context({**_RC, "svg.hashsalt": key}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        # Fixed margins align the plots of a column; a computed layout takes twice as long.
        left, right, bottom, top = MARGINS
        sides = {"left": left / size[0], "right": 1 - right / size[0]}
        figure.subplots_adjust(**sides, bottom=bottom / size[1], top=1 - top / size[1])
        axes.yaxis.set_label_coords(LABEL / size[0], 0.55, transform=figure.transFigure)
        axes.set_facecolor("none")
        axes.grid(axis="y", color=PLACEHOLDERS["grid"], linewidth=0.8)
        fill(axes)
        paper = io.StringIO()
        figure.savefig(paper, format="svg", metadata={"Date": None})
    return Markup(_in_page(paper.getvalue(), key, title))


def _in_page(svg: str, key: str, title: str) -> str:
    """Cut out the <svg>: unique ids, the page's colours, coordinates to a hundredth, a title."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(\bid=\"|href=\"#|url\(#)", rf"\g<1>{key}-", svg)
    svg = re.sub(
        r" (?:d|x|y)=\"[^\"]*\"", lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found.group()), svg
    )
    for name, colour in PLACEHOLDERS.items():
        svg = svg.replace(colour, f"var(--{name})")
    head = re.search(r"viewBox=\"[^\"]*\"", svg)
    assert head
    label = escape(title)
    begin = (
        f'<svg {head.group()} role="img" aria-label="{label}" class="plot"><title>{label}</title>'
    )
    return begin + svg[svg.index(">") + 1 :]
