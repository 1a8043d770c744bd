"""Entities in tags of BIO, compared with seqeval."""

import numpy as np
import pytest
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import get_entities

from mpillm.errors import UsageError
from mpillm.tasks.metrics.entity_f1 import EntityF1, entities
from mpillm.tasks.metrics.metric import Totals
from mpillm.tasks.metrics.metric_catalog import make_metrics

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "I-ORG")


def test_entities_and_their_f1_are_those_of_seqeval() -> None:
    chance = np.random.default_rng(2)
    metric = EntityF1.make(TAGS)
    for _ in range(1000):
        rows, words = int(chance.integers(1, 6)), int(chance.integers(1, 12))
        targets = chance.integers(0, len(TAGS), (rows, words))
        found = np.where(chance.random((rows, words)) < 0.7, targets, 0)
        counts = chance.random((rows, words)) < 0.9
        tags = [
            [[TAGS[number] for number in row[kept]] for row, kept in zip(each, counts, strict=True)]
            for each in (targets, found)
        ]
        fields = {"targets": targets, "counts": counts}
        statistics = metric.of_rows([np.eye(len(TAGS))[found]], fields)
        ours = metric.value(statistics.sum(0), Totals(0.0, 1.0, 0))
        assert ours == pytest.approx(f1_score(*tags, zero_division=0), abs=1e-12)
        for sentence in tags[0]:
            theirs = [(kind, first, last + 1) for kind, first, last in get_entities(sentence)]
            assert list(entities(sentence)) == theirs


def test_classes_that_are_no_tags_are_refused() -> None:
    with pytest.raises(UsageError, match="entity-f1 needs the classes O, B-KIND and I-KIND"):
        make_metrics(["entity-f1"], ["NOUN", "VERB"])
