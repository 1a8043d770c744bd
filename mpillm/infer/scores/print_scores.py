"""Print scores as tables: a line for each metric, a column for each model."""

from collections.abc import Mapping, Sequence

from mpillm.infer.scores.compare import ScoreDifference
from mpillm.infer.scores.score import Score
from mpillm.system.console import Console
from mpillm.tasks.metrics.metric import Metric


def print_scores(
    title: str,
    scores: Mapping[str, Score],
    metrics: Sequence[Metric],
    console: Console,
    differences: Mapping[str, ScoreDifference] | None = None,
) -> None:
    """Print the scores of models by name, each value with its interval.

    `differences`: of the second model from the first, by metric.
    """
    more = ["difference", "p"] if differences is not None else []
    lines = []
    for metric in (each for each in metrics if not each.is_table):
        cells = [score_cell(score, metric) for score in scores.values()]
        if differences is not None:
            cells += difference_cells(differences.get(metric.name), metric.digits)
        lines.append([metric.title, *cells])
    console.table(title, ["", *scores, *more], lines)


def print_confusions(
    scores: Mapping[str, Score], metrics: Sequence[Metric], classes: Sequence[str], console: Console
) -> None:
    """Print the tables of metrics that are tables, a line for each class of the targets."""
    for metric in (each for each in metrics if each.is_table):
        for name, score in scores.items():
            counts = score.tables.get(metric.name)
            if counts is None:
                continue
            if metric.table_columns:
                lines = [[_table_cell(value) for value in row] for row in counts]
                console.table(f"{metric.title} of {name}", metric.table_columns, lines)
                continue
            names = list(classes) or [str(number) for number in range(len(counts))]
            lines = [
                [label, *(f"{count:,}" for count in row)]
                for label, row in zip(names, counts, strict=True)
            ]
            console.table(f"{metric.title} of {name}: found as", ["", *names], lines)


def _table_cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def score_cell(score: Score, metric: Metric) -> str:
    """Write a value with its interval, such as `0.8125 (0.7934–0.8309)`."""
    value = score.values.get(metric.name)
    if value is None:
        return "–"
    interval, digits = score.intervals.get(metric.name), metric.digits
    bounds = f" ({interval[0]:,.{digits}f}–{interval[1]:,.{digits}f})" if interval else ""
    return f"{value:,.{digits}f}{bounds}"


def difference_cells(difference: ScoreDifference | None, digits: int) -> list[str]:
    """Write a difference with its interval, and its p."""
    if difference is None:
        return ["–", "–"]
    value, interval = f"{difference.value:+,.{digits}f}", difference.interval
    bounds = f" ({interval[0]:+,.{digits}f} to {interval[1]:+,.{digits}f})" if interval else ""
    return [value + bounds, f"{difference.p:.3f}"]
