from functools import cache

import jiwer
import numpy as np
import pytest

from mpillm.errors import UsageError
from mpillm.tasks.metrics.metric import Totals
from mpillm.tasks.metrics.token_error_rate import (
    TokenErrorRate,
    WordErrorRate,
    edit_distance,
    greedy,
)


def test_edits_are_those_of_the_definition() -> None:
    @cache
    def slow(one: tuple[int, ...], other: tuple[int, ...]) -> int:
        if not one or not other:
            return len(one) + len(other)
        return min(
            slow(one[1:], other) + 1,
            slow(one, other[1:]) + 1,
            slow(one[1:], other[1:]) + (one[0] != other[0]),
        )

    chance = np.random.default_rng(0)
    for _ in range(50):
        one, other = (tuple(chance.integers(0, 3, chance.integers(0, 7)).tolist()) for _ in "ab")
        assert edit_distance(one, other) == slow(one, other)


def test_repeats_and_blanks_are_dropped() -> None:
    assert greedy(np.array([0, 3, 3, 0, 3, 2, 2, 0])) == [3, 3, 2]
    assert greedy(np.array([0, 0])) == []


def test_only_real_positions_are_heard() -> None:
    outputs = np.eye(4)[[[1, 1, 0, 2], [3, 0, 1, 1]]]
    fields = {
        "lengths": np.array([4, 2]),
        "targets": np.array([[1, 3, 2], [3, 0, 0]]),
        "counts": np.array([[1, 1, 1], [1, 0, 0]]) > 0,
    }
    edits = TokenErrorRate().of_rows([outputs], fields)
    # 1 2 for 1 3 2, and 3 for 3: the last two positions of the second are no sound.
    assert edits.tolist() == [[1], [0]]
    assert TokenErrorRate().value(edits.sum(0), Totals(1.0, 4.0, 0)) == 0.25


def test_words_are_parted_by_the_space() -> None:
    def outputs_of(text: str) -> np.ndarray:
        # Each letter between blanks, as output of its byte + 1.
        return np.eye(130)[[0, *(k for c in text.encode() for k in (c + 1, 0))]]

    heard, said = "one tw three  four", "one two three four"
    fields = {
        "lengths": np.array([1 + 2 * len(heard)]),
        "targets": np.frombuffer(said.encode(), np.uint8)[None].astype(int) + 1,
        "counts": np.ones((1, len(said)), bool),
    }
    with pytest.raises(UsageError, match="a tokenizer whose space is a token of its own"):
        WordErrorRate().of_rows([outputs_of(heard)[None]], fields)
    rows = WordErrorRate().of_rows([outputs_of(heard)[None]], {**fields, "spaces": np.array([33])})
    assert rows.tolist() == [[1, 4]]
    assert WordErrorRate().value(rows[0], Totals(1.0, 18.0, 0)) == 0.25


def test_the_word_error_rate_of_texts_is_that_of_jiwer() -> None:
    chance = np.random.default_rng(5)
    words = ["one", "two", "three", "four", "five"]
    metric = WordErrorRate()
    for _ in range(1000):
        rows = int(chance.integers(1, 5))
        heard, said = (
            [" ".join(chance.choice(words, chance.integers(least, 8))) for _ in range(rows)]
            for least in (0, 1)
        )
        sums = metric.of_texts(heard, [[each] for each in said]).sum(0)
        assert metric.value(sums, Totals(0.0, 1.0, 0)) == pytest.approx(jiwer.wer(said, heard))


def test_of_several_references_the_nearest_counts() -> None:
    rows = WordErrorRate().of_texts(["a b c"], [["x y", "a b d c"]])
    assert rows.tolist() == [[1, 4]]
