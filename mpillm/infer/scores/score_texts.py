"""Score texts that a model wrote by their references, and problems by the samples that pass."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mpillm.comm.failure import on_all
from mpillm.errors import UsageError
from mpillm.infer.scores.exact_sums import in_batches
from mpillm.infer.scores.score import Score, score_rows
from mpillm.tasks.metrics.metric import Array, Metric
from mpillm.tasks.metrics.metric_catalog import check_metrics, make_metrics, metrics_of
from mpillm.tasks.metrics.pass_at_k import PassAtK
from mpillm.tasks.metrics.text_metric import TextMetric

if TYPE_CHECKING:
    from mpi4py import MPI

SAMPLES = "samples of a problem"


def score_texts(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    names: Sequence[str],
    comm: "MPI.Intracomm",
    numbers: Sequence[int] | None = None,
    intervals: bool = True,
) -> Score:
    """Score texts by the metrics `names`, such as bleu. Every rank calls it and gets the score.

    `hypotheses`: the texts of this rank, each with its `references`, one at least. `numbers`: the
    number of each among the texts of all ranks; None: they follow those of lower ranks. The score
    has the bits of one rank that has all. Raises UsageError on every rank for a metric that
    compares no texts, and for references of another number than the texts.
    """
    texts = make_text_metrics(names)

    def tables() -> list[Array]:
        _check_texts(hypotheses, references)
        # A rank may have none.
        own = texts if hypotheses else []
        return [metric.of_texts(hypotheses, references) for metric in own]

    found = on_all(comm, tables)
    score = _score(found, len(hypotheses), texts, comm, numbers, intervals)
    counts = set().union(*comm.allgather({len(known) for known in references}))
    signatures = {metric.name: metric.signature(counts) for metric in texts}
    return replace(score, signatures={name: each for name, each in signatures.items() if each})


def make_text_metrics(names: Sequence[str]) -> list[TextMetric]:
    """Make metrics of texts. Raises UsageError for another one, with those that there are."""
    made: list[TextMetric] = []
    for metric in make_metrics(names):
        if not isinstance(metric, TextMetric):
            known = metrics_of(TextMetric)  # type: ignore[type-abstract]
            raise UsageError(
                f"the metric {metric.name} compares no texts; take one of {', '.join(known)}"
            )
        made.append(metric)
    return made


def score_samples(
    samples: Sequence[int],
    passed: Sequence[int],
    names: Sequence[str],
    comm: "MPI.Intracomm",
    numbers: Sequence[int] | None = None,
) -> Score:
    """Score problems by the metrics `names`, such as pass@10: see `score_texts`.

    `samples`: of each problem of this rank, of which `passed` are right.
    """
    check_metrics(names, "of problems", SAMPLES)
    metrics = make_metrics(names)
    fields = {"samples": np.array(samples), "passed": np.array(passed)}
    kinds = [metric for metric in metrics if isinstance(metric, PassAtK)]
    found = on_all(comm, lambda: [metric.of_rows((), fields) for metric in kinds])
    return _score(found, len(samples), metrics, comm, numbers, True)


def _score(
    tables: Sequence[Array],
    rows: int,
    metrics: Sequence[Metric],
    comm: "MPI.Intracomm",
    numbers: Sequence[int] | None,
    intervals: bool,
) -> Score:
    """Score this rank's rows by their statistics; a row has the weight 1, and no loss."""
    counts = comm.allgather(rows)
    if not sum(counts):
        raise UsageError("there are no texts to score, nor samples: give one at least")
    first = sum(counts[: comm.rank])
    own = np.arange(first, first + rows) if numbers is None else np.array(numbers)
    whole = np.concatenate([np.zeros((rows, 1)), np.ones((rows, 1)), *tables], axis=1)
    return score_rows(
        in_batches(own, whole),
        [table.shape[1] for table in tables] if rows else (),
        metrics,
        comm,
        rows=sum(counts),
        intervals=intervals,
    )


def _check_texts(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(hypotheses) != len(references):
        raise UsageError(
            f"there are {len(hypotheses):,} texts and references for {len(references):,}: give the "
            "references of each text, in the order of the texts"
        )
    for number, known in enumerate(references):
        if isinstance(known, str) or not known:
            what = "one text in place of a list of them" if isinstance(known, str) else "none"
            raise UsageError(f"the references of text {number:,} are {what}; give a list of texts")
