"""Draw a timeline as a Gantt chart, on a terminal or as a picture: a line a rank, time across.

Each kind of action has a letter and a colour. Later chunks of a rank have darker shades. On a
terminal, chunks with odd numbers have small letters too, for terminals without colours.
"""

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.text import Text

from mpillm.errors import UsageError
from mpillm.parallel.pipeline.actions import KINDS, PipelineSchedule
from mpillm.parallel.pipeline.simulate import Span, Timeline
from mpillm.system.atomic import replacing

COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {"F": (122, 162, 247), "B": (115, 200, 130), "I": (90, 205, 205), "W": (240, 190, 90)}
)
"""Kind of action → red, green, blue."""
# The share of brightness that the last chunk keeps: darker, F and I could not be distinguished.
DARKEST = 0.6
# Below this mean of red, green and blue, white letters are read more easily than black ones.
DARK = 120
IDLE = "·"
# The font size in points. A digit's width is about 0.6 of it, with a margin 0.65: a label is drawn
# only where it fits.
FONT_POINTS, DIGIT_SHARE = 7, 0.65


def gantt_text(timeline: Timeline, schedule: PipelineSchedule, width: int) -> list[Text]:
    """Draw the chart in lines of at most `width` columns: legend, a line a rank, times.

    The chart is to scale with the microbatch in each cell where the labels fit. Otherwise a column
    is a slice of time, with the letter of the action in its middle.
    """
    names = [f"rank {rank} " for rank in range(schedule.ranks)]
    margin = max(map(len, names))
    columns, labelled = _scale(timeline, max(width - margin, 1))
    lines = [
        Text(line)
        for line in textwrap.wrap(_legend(schedule, None if labelled else columns), max(width, 20))
    ]
    for name, spans in zip(names, timeline.spans, strict=True):
        line = Text(name.ljust(margin), no_wrap=True)
        cells = (
            _cells(spans, columns, schedule)
            if labelled
            else _slices(spans, columns, timeline.makespan, schedule)
        )
        for text, style in cells:
            line.append(text, style)
        # 1e-6: a time that is a whole number of columns, but for rounding, is not cut to one less.
        line.append(IDLE * (int(timeline.makespan * columns + 1e-6) + margin - len(line)), "dim")
        lines.append(line)
    return [*lines, Text(_ruler("time".ljust(margin), timeline.makespan, columns))]


def _scale(timeline: Timeline, room: int) -> tuple[float, bool]:
    """Return (columns a unit of time, whether each cell has room for its label).

    Labels are followed by a space where that fits.
    """
    spans = [span for row in timeline.spans for span in row if span.end > span.begin]
    for space in (1, 0):
        needed = max((1 + len(str(s.action.microbatch)) + space) / (s.end - s.begin) for s in spans)
        if needed * timeline.makespan <= room + 1e-6:
            return needed, True
    return room / timeline.makespan, False


def _cells(
    spans: tuple[Span, ...], columns: float, schedule: PipelineSchedule
) -> Iterator[tuple[str, str]]:
    """Yield (text, style) of the waits and the actions of a rank."""
    at = 0
    for span in spans:
        begin, end = int(span.begin * columns + 1e-6), int(span.end * columns + 1e-6)
        yield IDLE * (begin - at), "dim"
        label = f"{_letter(span, schedule)}{span.action.microbatch}"
        yield label[: end - begin].ljust(end - begin), _style(span, schedule)
        at = end


def _slices(
    spans: tuple[Span, ...], columns: float, makespan: float, schedule: PipelineSchedule
) -> Iterator[tuple[str, str]]:
    """Yield (letter, style) of each column of a rank, for the action in the column's middle."""
    following = iter(spans)
    span = next(following, None)
    for column in range(int(makespan * columns + 1e-6)):
        middle = (column + 0.5) / columns
        while span is not None and span.end <= middle:
            span = next(following, None)
        if span is None or span.begin > middle:
            yield IDLE, "dim"
        else:
            yield _letter(span, schedule), _style(span, schedule)


def _letter(span: Span, schedule: PipelineSchedule) -> str:
    kind = span.action.kind
    return kind.lower() if schedule.chunk_of[span.action.stage] % 2 else kind


def _colour(kind: str, chunk: int, schedule: PipelineSchedule) -> str:
    light = 1 - (1 - DARKEST) * chunk / max(schedule.chunks - 1, 1)
    return "#" + "".join(f"{round(part * light):02x}" for part in COLOURS[kind])


def _colours(span: Span, schedule: PipelineSchedule) -> tuple[str, str]:
    """Return the colours of (the letters, the cell)."""
    cell = _colour(span.action.kind, schedule.chunk_of[span.action.stage], schedule)
    return ("white" if sum(bytes.fromhex(cell[1:])) < 3 * DARK else "black"), cell


def _style(span: Span, schedule: PipelineSchedule) -> str:
    return " on ".join(_colours(span, schedule))


def _legend(schedule: PipelineSchedule, columns: float | None) -> str:
    """List the letters of the chart; `columns` a unit of time, None where cells have labels."""
    present = {action.kind for row in schedule.rows for action in row}
    return "  ".join(
        [f"{kind} {name}" for kind, name in KINDS.items() if kind in present]
        + (["number: microbatch"] if columns is None else [f"a column: {1 / columns:.3g} of time"])
        + ["small letters: chunk 1 (3, …) of a rank"] * (schedule.chunks > 1)
        + [f"{IDLE} waits"]
    )


def _ruler(name: str, makespan: float, columns: float) -> str:
    """Write round times below their columns, at least ten columns apart."""
    # 1, 2 or 5 times a power of ten; the range covers what costs and counts allow.
    step = next(
        size * 10.0**power
        for power in range(-12, 22)
        for size in (1, 2, 5)
        if size * 10.0**power * columns >= 10
    )
    line = name
    for tick in range(int(makespan / step + 1e-9) + 1):
        line = line.ljust(len(name) + int(tick * step * columns + 1e-6)) + f"{tick * step:g}"
    return line


def gantt_picture(
    timeline: Timeline, schedule: PipelineSchedule, path: Path, kind: str = ""
) -> None:
    """Write the chart as svg or png: `kind`, else by the suffix of `path`.

    Raises UsageError for another suffix, OSError where the file cannot be written.
    """
    kind = kind or path.suffix.removeprefix(".")
    if kind not in ("svg", "png"):
        raise UsageError(f"a chart is drawn as .svg or .png, not as {path.name}; end its name so")
    # Imported here: a chart on the terminal needs no matplotlib, which is slow to load.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 1.6 + 0.4 * schedule.ranks), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for rank, spans in enumerate(timeline.spans):
        _draw_rank(
            axes, rank, spans, schedule, figure.get_figwidth() * 72 * 0.92 / timeline.makespan
        )
    axes.set(
        xlabel="time", ylabel="rank", xlim=(0, timeline.makespan), ylim=(schedule.ranks - 0.5, -0.5)
    )
    axes.set_yticks(range(schedule.ranks))
    axes.set_title(
        f"{schedule.name}: {schedule.ranks} ranks, {schedule.stages} stages, "
        f"{schedule.microbatches} microbatches, bubble {timeline.bubble:.1%}"
    )
    _draw_legend(figure, schedule)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=120)


def _draw_rank(
    axes: Any, rank: int, spans: tuple[Span, ...], schedule: PipelineSchedule, points: float
) -> None:
    """Draw the bars and labels of a rank; `points` is the width of a unit of time."""
    # One call of broken_barh a colour: thousands of separate cells would take seconds.
    bars: dict[str, list[tuple[float, float]]] = {}
    for span in spans:
        ink, colour = _colours(span, schedule)
        duration, label = span.end - span.begin, str(span.action.microbatch)
        bars.setdefault(colour, []).append((span.begin, duration))
        if len(label) * FONT_POINTS * DIGIT_SHARE <= duration * points:
            place = ((span.begin + span.end) / 2, rank)
            axes.text(
                *place,
                label,
                ha="center",
                va="center",
                fontsize=FONT_POINTS,
                color=ink,
                clip_on=True,
            )
    for colour, places in bars.items():
        # A white edge would hide bars that are narrower than half a letter.
        narrowest = min(duration for _, duration in places) * points
        line = 0.4 if narrowest > FONT_POINTS / 2 else 0.0
        axes.broken_barh(
            places, (rank - 0.4, 0.8), facecolors=colour, edgecolors="white", linewidth=line
        )


def _draw_legend(figure: Any, schedule: PipelineSchedule) -> None:
    from matplotlib.patches import Patch

    chunks = schedule.chunks
    present = {action.kind for row in schedule.rows for action in row}
    patches = [
        Patch(
            color=_colour(kind, chunk, schedule),
            label=f"{name}, chunk {chunk}" if chunks > 1 else name,
        )
        for kind, name in KINDS.items()
        if kind in present
        for chunk in range(chunks)
    ]
    figure.legend(
        handles=patches, fontsize="small", loc="outside lower center", ncols=min(len(patches), 6)
    )
