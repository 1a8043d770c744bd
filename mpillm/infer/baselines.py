"""Baselines by counting: unigram and bigram models of the training tokens, scored on another split.

A trained model has to beat them to be worth its cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpillm.infer.scores.score import Score
from mpillm.tasks.metrics.metric import Metric, Totals
from mpillm.tokens.reader import TokenReader

Ids = np.ndarray[Any, np.dtype[np.int64]]
# More training tokens hardly change the counts, and all are held in memory at once.
LARGEST_COUNT = 50_000_000
READ_TOKENS = 1 << 20


@dataclass(frozen=True)
class Baselines:
    unigram: Score
    bigram: Score


def score_baselines(
    train: TokenReader, held_out: TokenReader, vocab_size: int, metrics: Sequence[Metric]
) -> Baselines:
    """Score both models by `metrics` over the targets of `evaluate`: all of `held_out` but one.

    Unigram: counts plus one. Bigram: Witten & Bell 1991, interpolated with that unigram. The
    unigram's weight after a token grows with the number of different followers of that token.
    """
    ids = read_tokens(train)
    targets = read_tokens(held_out)
    counts = np.bincount(ids, minlength=vocab_size)
    unigram = (counts + 1) / (len(ids) + vocab_size)
    probability = _bigram(ids, targets, counts, unigram, vocab_size)
    scored, text_bytes = float(len(targets) - 1), held_out.split.n_bytes

    def score(p: np.ndarray[Any, Any]) -> Score:
        loss_sum = float(-np.log(p).mean()) * scored
        return Score.from_totals(Totals(loss_sum, scored, text_bytes), metrics)

    return Baselines(score(unigram[targets[1:]]), score(probability))


def _bigram(
    ids: Ids, targets: Ids, counts: Ids, unigram: np.ndarray[Any, Any], vocab_size: int
) -> np.ndarray[Any, Any]:
    """Compute p(target | token before it) for each target but the first."""
    pairs, pair_counts = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
    kinds = np.bincount(pairs // vocab_size, minlength=vocab_size)
    before = targets[:-1]
    wanted = before * vocab_size + targets[1:]
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, pair_counts[place], 0)
    # The last training token has one more occurrence than followers: too little to correct for.
    weight = counts[before] + kinds[before]
    mixed = (seen + kinds[before] * unigram[targets[1:]]) / np.maximum(weight, 1)
    return np.asarray(np.where(weight > 0, mixed, unigram[targets[1:]]))


def read_tokens(reader: TokenReader) -> Ids:
    """Read the tokens of a split, at most LARGEST_COUNT, int64 (n,)."""
    total = min(reader.n_tokens, LARGEST_COUNT)
    ids = np.empty(total, np.int64)
    buffer = np.empty(min(total, READ_TOKENS), reader.dtype)
    for first in range(0, total, READ_TOKENS):
        piece = buffer[: min(READ_TOKENS, total - first)]
        reader.read(first, piece)
        ids[first : first + len(piece)] = piece
    return ids
