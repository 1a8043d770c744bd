"""What a report shows of a run's evaluations: a table of figures, confusions, and reliability."""

from collections.abc import Sequence

from mpillm.runs.evaluations import RecordedEvaluation, RecordedScore
from mpillm.runs.report.class_plots import CONFUSION, RELIABILITY, reliability_points
from mpillm.runs.report.drawing import draw_reliability
from mpillm.runs.report.page import Picture, Table

# The newest ones of a run that was evaluated in a loop.
MOST_SHOWN = 20


def evaluation_tables(evaluations: Sequence[RecordedEvaluation]) -> list[Table]:
    """Return the table of all figures, and the confusion matrix of the newest that has one."""
    rows = [
        [
            each.time,
            f"{each.step:,}",
            each.data,
            name,
            metric,
            f"{value:,.4f}",
            _bounds(score, metric),
            f"{score.rows:,}",
        ]
        for each in list(evaluations)[: -MOST_SHOWN - 1 : -1]
        for name, score in each.scores.items()
        for metric, value in score.values.items()
    ]
    columns = ["time", "step", "data", "of", "figure", "value", "95% interval", "rows"]
    note = (
        f"The newest {MOST_SHOWN} of {len(evaluations):,} are shown."
        if len(evaluations) > MOST_SHOWN
        else ""
    )
    tables = [Table("Evaluations", columns, rows, frozenset({1, 5, 6, 7}), note, wide=True)]
    found = _newest(evaluations, CONFUSION)
    return [*tables, _confusions(*found)] if found else tables


def reliability_picture(evaluations: Sequence[RecordedEvaluation]) -> list[Picture]:
    """Return the reliability plot of the newest evaluation that has one, or nothing."""
    found = _newest(evaluations, RELIABILITY)
    if not found:
        return []
    each, name, rows = found
    points = reliability_points(rows)
    if not points:
        return []
    total = sum(count for _, _, count in points)
    error = sum(count * abs(right - expected) for expected, right, count in points) / total
    caption = (
        f"{name} at step {each.step:,} on {each.data}: of the targets whose class has a "
        "probability in a bin, the share that is right. On the dashed line both are equal; the "
        f"mean distance from it, ECE, is {error:.4f}. A dot's area is the bin's share of "
        f"{total:,.0f} targets."
    )
    svg = draw_reliability(points)
    return [Picture("reliability", "Reliability", svg, [("bins", "a")], caption)]


def _newest(
    evaluations: Sequence[RecordedEvaluation], table: str
) -> tuple[RecordedEvaluation, str, Sequence[Sequence[float]]] | None:
    for each in reversed(evaluations):
        for name, score in each.scores.items():
            if rows := score.tables.get(table):
                return each, name, rows
    return None


def _confusions(each: RecordedEvaluation, name: str, counts: Sequence[Sequence[float]]) -> Table:
    numbers = [str(number) for number in range(len(counts))]
    names = list(each.classes) if len(each.classes) == len(counts) else numbers
    rows = [
        [label, *(f"{count:,.0f}" for count in row)]
        for label, row in zip(names, counts, strict=True)
    ]
    return Table(
        "Confusion matrix",
        ["class", *(f"found as {label}" for label in names)],
        rows,
        frozenset(range(1, len(names) + 1)),
        f"{name} at step {each.step:,} on {each.data}: a line for each class of the targets.",
        wide=len(names) > 6,
    )


def _bounds(score: RecordedScore, metric: str) -> str:
    found = score.intervals.get(metric)
    return f"{found[0]:,.4f}–{found[1]:,.4f}" if found else ""
