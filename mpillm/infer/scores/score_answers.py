"""Answer the questions of a split by spans of their contexts, and score the answers' texts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpillm.comm.failure import on_all
from mpillm.errors import UsageError
from mpillm.infer.evaluate import Scorer, collect_rows, evaluate
from mpillm.infer.scores.score import Score, score_rows
from mpillm.infer.scores.score_texts import score_texts
from mpillm.system.console import Console
from mpillm.tasks.metrics.metric_catalog import make_metrics
from mpillm.tasks.question_answering import best_spans
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.samples import SampleReader

if TYPE_CHECKING:
    from mpi4py import MPI

METRICS = ("exact-match", "squad-f1")


def evaluate_task(
    scorer: Scorer,
    reader: SampleReader,
    comm: "MPI.Intracomm",
    console: Console,
    names: Sequence[str] = (),
    intervals: bool = False,
) -> Score:
    """Score a split by what its task has: answers to questions by their texts, rows else.

    Every rank calls it: see `score_answers` and `evaluate`.
    """
    if scorer.task.answer_metrics and isinstance(reader, PairReader):
        return score_answers(scorer, reader, comm, console, names, intervals)
    return evaluate(scorer, reader, comm, console, names, intervals)


def score_answers(
    scorer: Scorer,
    reader: PairReader,
    comm: "MPI.Intracomm",
    console: Console,
    names: Sequence[str] = (),
    intervals: bool = True,
) -> Score:
    """Score the best answer to each question by exact match and SQuAD's F1, with the loss of rows.

    A question's rows are its spans of the context; the best span of all of them is the answer.
    Where some question has no answer, that of a row's position 0 is empty text. Every rank calls
    it and gets the same score. Raises UsageError for metrics that compare no answers.
    """
    chosen = [name for name in names if name != "loss"] or list(METRICS)
    if odd := [name for name in chosen if name not in METRICS]:
        raise UsageError(
            f"the metric {odd[0]} compares no answers; take loss, {' or '.join(METRICS)}"
        )
    own, widths, rows = collect_rows(scorer, reader, comm, console, [best_spans])
    loss = score_rows(own, widths, make_metrics(["loss"]), comm, rows=rows, intervals=intervals)
    spans = {
        int(number): row[2:]
        for each in own
        for number, row in zip(each.numbers_B, each.statistics.table.tolist(), strict=True)
    }
    every = {number: row for each in comm.allgather(spans) for number, row in each.items()}
    found = on_all(comm, lambda: _answers(reader, every, comm.rank, comm.size))
    numbers, texts, references = found
    score = score_texts(texts, references, chosen, comm, numbers, intervals)
    return replace(
        score,
        totals=loss.totals,
        values={**loss.values, **score.values},
        intervals={**loss.intervals, **score.intervals},
        replicates={**loss.replicates, **score.replicates},
    )


def _answers(
    reader: PairReader, spans: dict[int, list[float]], share: int, shares: int
) -> tuple[list[int], list[str], list[list[str]]]:
    """Write the answers to this rank's share of the questions: their numbers, texts, references."""
    rows: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for number in sorted(spans):
        target = reader.answer(number)
        rows.setdefault(target["question"], []).append((number, target))
    empty = any(not each[0][1]["answers"] for each in rows.values())
    numbers, texts, references = [], [], []
    for place, (_, own) in enumerate(sorted(rows.items())):
        if place % shares != share:
            continue
        number, target = max(own, key=lambda each: spans[each[0]][0])
        score, first, last, _ = spans[number]
        null = min(spans[each][3] for each, _ in own)
        none = empty and null > score
        numbers.append(place)
        texts.append("" if none else _text(target, int(first), int(last)))
        references.append(target["answers"] or [""])
    return numbers, texts, references


def _text(target: dict[str, Any], first: int, last: int) -> str:
    """Return the characters of the context from the first to the last position of a row."""
    offsets, begin = target["offsets"], target["first"]
    if not offsets:
        return ""
    start, end = offsets[2 * (first - begin)], offsets[2 * (last - begin) + 1]
    return str(target["context"][start:end])
