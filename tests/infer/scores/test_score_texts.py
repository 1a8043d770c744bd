"""Texts scored by ranks that each have some, compared with one rank that has all."""

import numpy as np
import pytest
from mpi4py import MPI
from sacrebleu.metrics import BLEU

from mpillm.errors import UsageError
from mpillm.infer.scores.score_texts import score_samples, score_texts

NAMES = ["bleu", "chrf", "rouge-1", "rouge-l", "squad-f1", "exact-match", "word-error-rate"]
ROWS = 150


def texts() -> tuple[list[str], list[list[str]]]:
    chance = np.random.default_rng(0)
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "dogs",
        "ran",
        "in",
        "rivers",
        "of",
        "water",
    ]
    references = [" ".join(chance.choice(words, chance.integers(4, 12))) for _ in range(ROWS)]
    hypotheses = [" ".join(w for w in each.split() if chance.random() < 0.9) for each in references]
    return hypotheses, [[each] for each in references]


def test_the_score_has_the_same_bits_however_ranks_share_the_texts(comm: MPI.Intracomm) -> None:
    hypotheses, references = texts()
    alone = score_texts(hypotheses, references, NAMES, MPI.COMM_SELF)
    bounds = np.linspace(0, ROWS, comm.size + 1).astype(int)
    own = slice(*bounds[comm.rank : comm.rank + 2])
    assert score_texts(hypotheses[own], references[own], NAMES, comm) == alone
    numbers = list(range(comm.rank, ROWS, comm.size))
    ours, known = ([each[number] for number in numbers] for each in (hypotheses, references))
    assert score_texts(ours, known, NAMES, comm, numbers) == alone
    assert alone.rows == ROWS
    assert list(alone.signatures) == ["bleu", "chrf", "rouge-1", "rouge-l"]
    for name in NAMES:
        low, high = alone.intervals[name] or (0, 0)
        assert low < alone.values[name] < high


def test_bleus_interval_is_that_of_sacrebleu() -> None:
    """Of another bootstrap: its own draws, with as many rows in each replicate."""
    hypotheses, references = texts()
    ours = score_texts(hypotheses, references, ["bleu"], MPI.COMM_SELF).intervals["bleu"]
    streams = [[each[0] for each in references]]
    theirs = BLEU().corpus_score(hypotheses, streams, n_bootstrap=1000)
    assert ours is not None
    half = (ours[1] - ours[0]) / 2
    assert half == pytest.approx(theirs._ci, rel=0.15)
    assert sum(ours) / 2 == pytest.approx(theirs._mean, abs=0.2 * half)


def test_problems_are_scored_by_their_samples(comm: MPI.Intracomm) -> None:
    chance = np.random.default_rng(1)
    passed = chance.integers(0, 21, 60).tolist()
    numbers = list(range(comm.rank, 60, comm.size))
    own = [passed[number] for number in numbers]
    score = score_samples([20] * len(own), own, ["pass@1", "pass@10"], comm, numbers)
    assert score.values["pass@1"] == pytest.approx(np.mean(passed) / 20)
    assert score == score_samples([20] * 60, passed, ["pass@1", "pass@10"], MPI.COMM_SELF)


def test_wrong_texts_are_refused_on_every_rank(comm: MPI.Intracomm) -> None:
    # One rank alone has the wrong ones.
    wrong = comm.rank == comm.size - 1
    with pytest.raises(UsageError, match="there are 1 texts and references for 2"):
        score_texts(["a"], [["a"], ["b"]] if wrong else [["a"]], ["bleu"], comm)
    with pytest.raises(UsageError, match="the references of text 0 are none"):
        score_texts(["a"], [[]] if wrong else [["a"]], ["rouge-1"], comm)
    with pytest.raises(UsageError, match="are one text in place of a list"):
        score_texts(["a"], ["a"] if wrong else [["a"]], ["rouge-1"], comm)
    with pytest.raises(UsageError, match="there are no texts to score"):
        score_texts([], [], ["rouge-1"], comm)
    with pytest.raises(
        UsageError, match=r"the metric accuracy compares no texts; take one of .*bleu"
    ):
        score_texts(["a"], [["a"]], ["accuracy"], comm)
    with pytest.raises(UsageError, match="the metric loss compares no texts"):
        score_texts(["a"], [["a"]], ["loss"], comm)
    with pytest.raises(UsageError, match="problem 0 has 5, and 9 right"):
        score_samples([5], [9 if wrong else 1], ["pass@1"], comm)
