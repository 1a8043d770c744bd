"""Metrics of retrieval: how far ahead in its list a query finds the documents that are relevant.

A row is a query. Fields: `gains` (B, R), the relevance of the R best documents, the best one first;
`ideal` (B, R), the relevances of all its documents from the largest on, 0 after them; `relevant`
(B,), how many these are. A gain of 0 is not relevant.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from mpillm.tasks.metrics.metric import Array, Arrays, Metric, Totals

RANKINGS = ("a list of documents of each query",)


class ReciprocalRank(Metric):
    """The mean of 1 / place of the first relevant document among the 10 best; 0 without one."""

    name: ClassVar[str] = "mrr@10"
    title: ClassVar[str] = "MRR@10"
    output_kinds: ClassVar[tuple[str, ...]] = RANKINGS
    k: ClassVar[int] = 10

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        hits_BK = fields["gains"][:, : self.k] > 0
        places_B = hits_BK.argmax(1) + 1
        return np.where(hits_BK.any(1), 1 / places_B, 0.0)[:, None]

    def value(self, sums: Array, totals: Totals) -> float:
        return float(sums[0]) / totals.weight


class RecallAt1(ReciprocalRank):
    """The mean share of a query's relevant documents that are among the k best."""

    name: ClassVar[str] = "recall@1"
    title: ClassVar[str] = "recall@1"
    k: ClassVar[int] = 1

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        hits_B = (fields["gains"][:, : self.k] > 0).sum(1)
        return np.asarray(hits_B / fields["relevant"])[:, None]


class RecallAt10(RecallAt1):
    name: ClassVar[str] = "recall@10"
    title: ClassVar[str] = "recall@10"
    k: ClassVar[int] = 10


class RecallAt100(RecallAt1):
    name: ClassVar[str] = "recall@100"
    title: ClassVar[str] = "recall@100"
    k: ClassVar[int] = 100


class Ndcg(ReciprocalRank):
    """The mean discounted gain of the 10 best documents, over that of the best possible list.

    A document's gain is its relevance, over log2 of its place + 1 (Järvelin & Kekäläinen 2002).
    """

    name: ClassVar[str] = "ndcg@10"
    title: ClassVar[str] = "nDCG@10"

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        found_B, best_B = (_discounted(fields[name], self.k) for name in ("gains", "ideal"))
        return np.asarray(found_B / best_B)[:, None]


def _discounted(gains_BR: Array, k: int) -> Array:
    gains_BK = gains_BR[:, :k].astype(np.float64)
    return np.asarray((gains_BK / np.log2(np.arange(gains_BK.shape[1]) + 2)).sum(1))
