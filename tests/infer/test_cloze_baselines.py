"""The guesses of hidden tokens by counting, compared with sums written out."""

import math
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.errors import UsageError
from mpillm.infer.cloze_baselines import score_cloze_baselines
from mpillm.infer.print_evaluation import check_baselines
from mpillm.system.console import Console
from mpillm.tasks.masked_lm import MaskedLM
from mpillm.tasks.metrics.metric_catalog import make_metrics
from mpillm.tasks.span_corruption import SpanCorruption
from mpillm.tasks.task_catalog import TaskSettings
from mpillm.tasks.vocabulary import Lengths, Vocabulary
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.reader import open_split
from mpillm.tokens.samples import RowShape

SIZE, LENGTHS = 257, Lengths(40, 40)


def test_both_guesses_are_those_of_the_counts(
    folder: Path, documents: Path, comm: MPI.Intracomm
) -> None:
    data = folder / "data"
    options = PrepareOptions((str(documents),), data, tokenizer="bytes", validation=0.1)
    prepare(options, comm, Console(speaks=False))
    vocabulary = Vocabulary(SIZE, SIZE - 1)
    task = MaskedLM.make(TaskSettings(name="masked-lm"), vocabulary, LENGTHS)
    with open_split(data) as train, open_split(data, "validation") as held_out:
        ids = np.empty(train.n_tokens, train.dtype)
        train.read(0, ids)
        samples = held_out.evaluation(RowShape.of(task, LENGTHS), 4)
        metrics = make_metrics(["loss", "perplexity", "accuracy"])
        found = score_cloze_baselines(train, samples, task, metrics)
        batches = [task.fields(samples.raw(number)) for number in range(len(samples.shapes))]
    counts = Counter(ids.tolist())
    unigram = [(counts[token] + 1) / (len(ids) + SIZE) for token in range(SIZE)]
    after: dict[int, Counter[int]] = defaultdict(Counter)
    before: dict[int, Counter[int]] = defaultdict(Counter)
    for left, right in pairwise(ids.tolist()):
        after[left][right] += 1
        before[right][left] += 1

    def next_to(seen: Counter[int], token: int) -> float:
        weight = seen.total() + len(seen)
        return (seen[token] + len(seen) * unigram[token]) / weight if weight else unigram[token]

    losses, hits = [], []
    for fields in batches:
        for row, place in fields["counts"].nonzero().tolist():
            around = [SIZE, *fields["ids"][row].tolist(), SIZE]
            sides = after[around[place]], before[around[place + 2]]
            shares = [
                math.prod(next_to(side, token) for side in sides) / unigram[token]
                for token in range(SIZE)
            ]
            target = int(fields["targets"][row, place])
            losses.append(-math.log(shares[target] / sum(shares)))
            hits.append(max(range(SIZE), key=shares.__getitem__) == target)
    assert found.bigram.totals.weight == len(losses) > 200
    assert found.bigram.loss == pytest.approx(np.mean(losses))
    assert found.bigram.values["accuracy"] == pytest.approx(np.mean(hits), abs=2 / len(hits))
    assert found.bigram.loss < found.unigram.loss < math.log(SIZE)
    assert found.bigram.values["accuracy"] > found.unigram.values["accuracy"] > 0


def test_a_task_without_baselines_says_so() -> None:
    vocabulary = Vocabulary(SIZE, SIZE - 1)
    task = SpanCorruption.make(TaskSettings(name="span-corruption"), vocabulary, LENGTHS)
    with pytest.raises(UsageError, match="no baselines of the task span-corruption"):
        check_baselines(task)
