"""Score retrieval by embeddings: documents in the order of their similarity to a query.

Shapes: Q queries, D documents, C width, B queries at once, R documents of a list.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.comm.failure import on_all
from mpillm.errors import UsageError
from mpillm.infer.scores.exact_sums import in_batches
from mpillm.infer.scores.score import Score, score_rows
from mpillm.tasks.metrics.metric import Array
from mpillm.tasks.metrics.metric_catalog import check_metrics, make_metrics
from mpillm.tasks.metrics.retrieval import RANKINGS

if TYPE_CHECKING:
    from mpi4py import MPI

METRICS = ("recall@1", "recall@10", "recall@100", "mrr@10", "ndcg@10")
# The longest list that a metric reads.
LONGEST = 100
# Similarities of a batch of queries, in float32: 256 MiB at a million documents.
QUERIES_AT_ONCE = 64


def score_retrieval(
    queries_QC: Array,
    documents_DC: Array,
    relevant: Sequence[Mapping[int, float]],
    comm: "MPI.Intracomm",
    names: Sequence[str] = METRICS,
) -> Score:
    """Score the retrieval of documents by the inner product of embeddings, by the metrics `names`.

    `relevant`: of each query the relevance, above 0, of its documents by their numbers. Every rank
    calls it with the same arguments, ranks a share of the queries, and gets the score. Equal
    similarities are in the order of the documents. Raises UsageError on every rank for a query
    without a relevant document, and for numbers that do not fit.
    """
    _check(queries_QC, documents_DC, relevant)
    check_metrics(names, "of retrieval", RANKINGS[0])
    metrics = make_metrics(names)
    firsts = range(0, len(queries_QC), QUERIES_AT_ONCE)

    def tables() -> list[tuple[Array, list[Array]]]:
        found = []
        # Batches do not depend on the number of ranks, so that similarities have the same bits.
        for first in firsts[comm.rank :: comm.size]:
            numbers_B = np.arange(first, min(first + QUERIES_AT_ONCE, len(queries_QC)))
            fields = _fields(
                queries_QC[numbers_B], documents_DC, [relevant[n] for n in numbers_B.tolist()]
            )
            found.append((numbers_B, [metric.of_rows((), fields) for metric in metrics]))
        return found

    own, widths = [], ()
    for numbers_B, each in on_all(comm, tables):
        rows = len(numbers_B)
        whole = np.concatenate([np.zeros((rows, 1)), np.ones((rows, 1)), *each], axis=1)
        own += in_batches(numbers_B, whole)
        widths = tuple(table.shape[1] for table in each)
    return score_rows(own, widths, metrics, comm, rows=len(queries_QC))


def ranked(queries_BC: Array, documents_DC: Array, longest: int = LONGEST) -> Array:
    """Return the numbers of the `longest` most similar documents of each query, (B, R)."""
    similar_BD = queries_BC @ documents_DC.T
    count = min(longest, similar_BD.shape[1])
    lists = []
    for similar_D in similar_BD:
        # A whole sort of a million documents would take most of the time.
        least = np.partition(similar_D, -count)[-count]
        near = np.flatnonzero(similar_D >= least)
        # Stable: of equal ones the first is first, on any machine.
        lists.append(near[np.argsort(-similar_D[near], kind="stable")][:count])
    return np.stack(lists)


def _fields(
    queries_BC: Array, documents_DC: Array, relevant: Sequence[Mapping[int, float]]
) -> dict[str, Array]:
    lists_BR = ranked(queries_BC, documents_DC)
    gains, ideal = np.zeros((2, *lists_BR.shape))
    for row, known in enumerate(relevant):
        gains[row] = [known.get(int(number), 0.0) for number in lists_BR[row]]
        best = sorted(known.values(), reverse=True)[: lists_BR.shape[1]]
        ideal[row, : len(best)] = best
    counts = np.array([len(known) for known in relevant])
    return {"gains": gains, "ideal": ideal, "relevant": counts}


def _check(queries_QC: Array, documents_DC: Array, relevant: Sequence[Mapping[int, float]]) -> None:
    """Raise UsageError where the arguments do not fit each other: the same on every rank."""
    for problem in _problems(queries_QC, documents_DC, relevant):
        raise UsageError(problem)


def _problems(queries_QC: Any, documents_DC: Any, relevant: Any) -> Iterator[str]:
    queries, documents = len(queries_QC), len(documents_DC)
    if not queries or not documents:
        yield f"there are {queries:,} queries and {documents:,} documents; give some of each"
    elif queries_QC.shape[1] != documents_DC.shape[1]:
        yield (
            f"queries have {queries_QC.shape[1]:,} numbers each and documents "
            f"{documents_DC.shape[1]:,}; embed both with one model"
        )
    for name, given in (("query", queries_QC), ("document", documents_DC)):
        odd = np.flatnonzero(~np.isfinite(given).all(-1)).tolist()
        if odd:
            yield f"the embedding of {name} {odd[0]:,} is not finite; embed it again"
    if len(relevant) != queries:
        yield (
            f"there are {queries:,} queries, and relevant documents of {len(relevant):,}; give "
            "those of each query, in the order of the queries"
        )
    for number, known in enumerate(relevant):
        if not known:
            yield f"query {number:,} has no relevant document, and no recall; leave it out"
        for document, gain in known.items():
            if not (0 <= document < documents and 0 < gain < np.inf):
                yield (
                    f"query {number:,} has the relevance {gain} of document {document:,}, and "
                    f"there are {documents:,}, each relevant by a number above 0; leave others out"
                )
