"""Baselines of masked LM by counting: a hidden token guessed from all tokens, or from both
neighbours.

Shapes: B rows, T positions, N hidden positions, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpillm.infer.baselines import Baselines, read_tokens
from mpillm.infer.scores.score import Score
from mpillm.tasks.masked_lm import MaskedLM
from mpillm.tasks.metrics.metric import Metric, Totals
from mpillm.tokens.reader import TokenReader
from mpillm.tokens.samples import EvaluationSamples

Array = np.ndarray[Any, np.dtype[Any]]
# Positions at a time: their probabilities of all tokens are held at once.
PIECE = 256


class _Neighbours:
    """Counts of the tokens next to each token, on one side."""

    def __init__(self, known: Array, others: Array, unigram: Array) -> None:
        """Count each `others[i]` next to `known[i]`. `unigram`: the probability of each token."""
        size = len(unigram)
        pairs, self._counts = np.unique(known * size + others, return_counts=True)
        self._others, self._unigram = pairs % size, unigram
        self._edges = np.searchsorted(pairs // size, np.arange(size + 1))

    def ratio(self, token: int) -> Array:
        """Return p(x | token) / p(x) of each token x, (V,); interpolated as in `baselines`."""
        if token >= len(self._unigram):
            # The mask itself: it says nothing.
            return np.ones_like(self._unigram)
        span = slice(self._edges[token], self._edges[token + 1])
        counts, kinds = self._counts[span], span.stop - span.start
        weight = float(counts.sum() + kinds)
        if not weight:
            return np.ones_like(self._unigram)
        found = np.full(len(self._unigram), kinds / weight)
        others = self._others[span]
        found[others] += counts / (weight * self._unigram[others])
        return found


def score_cloze_baselines(
    train: TokenReader, samples: EvaluationSamples, task: MaskedLM, metrics: Sequence[Metric]
) -> Baselines:
    """Score both guesses by `metrics`, over the targets of the model's own evaluation.

    Unigram: counts plus one. Bigram: p(x | left) · p(x | right) / p(x), each interpolated with that
    unigram (Witten & Bell 1991); a neighbour that is hidden counts for nothing.
    """
    ids, size = read_tokens(train), task.vocabulary.size
    unigram = (np.bincount(ids, minlength=size) + 1) / (len(ids) + size)
    after = _Neighbours(ids[:-1], ids[1:], unigram)
    before = _Neighbours(ids[1:], ids[:-1], unigram)

    def guess(left: int, right: int) -> Array:
        return unigram * after.ratio(left) * before.ratio(right)

    of_both = _Sums(metrics), _Sums(metrics)
    for number in range(len(samples.shapes)):
        fields = {name: each.numpy() for name, each in task.fields(samples.raw(number)).items()}
        # Padded by the mask, which says nothing: no neighbour at the ends of a row.
        ids_BT = np.pad(fields["ids"], ((0, 0), (1, 1)), constant_values=size)
        rows, places = np.nonzero(fields["counts"])
        left, right = ids_BT[rows, places], ids_BT[rows, places + 2]
        targets = fields["targets"][rows, places]
        for first in range(0, len(targets), PIECE):
            piece = slice(first, first + PIECE)
            near = [guess(*pair) for pair in zip(left[piece], right[piece], strict=True)]
            of_both[0].add(np.broadcast_to(unigram, (len(near), size)), targets[piece])
            of_both[1].add(np.array(near), targets[piece])
    return Baselines(*(sums.score() for sums in of_both))


class _Sums:
    """The sums of a loss and of metrics over pieces of hidden positions."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics
        self._losses: list[float] = []
        self._weight = 0
        self._of_metrics: list[list[Array]] = [[] for _ in metrics]

    def add(self, shares_NV: Array, targets_N: Array) -> None:
        """Add positions by their probabilities, not normalised."""
        logs_NV = np.log(shares_NV)
        normaliser_N = np.log(shares_NV.sum(-1))
        own_N = logs_NV[np.arange(len(targets_N)), targets_N] - normaliser_N
        self._losses.append(-float(own_N.sum()))
        self._weight += len(targets_N)
        for metric, sums in zip(self._metrics, self._of_metrics, strict=True):
            sums.append(metric.of_rows([logs_NV], {"targets": targets_N}).sum(0))

    def score(self) -> Score:
        totals = Totals(math.fsum(self._losses), float(self._weight), 0)
        values = {
            metric.name: metric.value(np.sum(sums, 0), totals)
            for metric, sums in zip(self._metrics, self._of_metrics, strict=True)
        }
        return Score(totals, values)
