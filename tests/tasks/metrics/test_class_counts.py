"""Metrics of classes, each equal to scikit-learn's on 1,000 random cases."""

from collections.abc import Iterator

import numpy as np
import pytest
from sklearn import config_context
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from mpillm.errors import UsageError
from mpillm.tasks.metrics.metric import Totals
from mpillm.tasks.metrics.metric_catalog import make_metrics

CASES = 1000
TOTALS = Totals(0.0, 1.0, 0)
NAMES = ("accuracy", "precision", "recall", "macro-f1", "micro-f1", "confusion-matrix")


def cases() -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], np.ndarray, np.ndarray]]:
    """Yield outputs and fields, of rows or of positions, with the classes found and those there."""
    chance = np.random.default_rng(8)
    for number in range(CASES):
        rows, classes = int(chance.integers(1, 30)), int(chance.integers(2, 7))
        shape = (rows,) if number % 2 else (rows, 4)
        outputs = chance.normal(size=(*shape, classes))
        fields = {"targets": chance.integers(0, max(1, classes - number % 3), shape)}
        counted = np.ones(shape, bool)
        if number % 2 == 0:
            counted = chance.random(shape) < 0.7
            counted[0, 0] = True
            fields["counts"] = counted
        yield outputs, fields, outputs.argmax(-1)[counted], fields["targets"][counted]


@config_context(skip_parameter_validation=True, assume_finite=True)
def test_each_equals_scikit_learn() -> None:
    metrics = make_metrics(NAMES)
    for outputs, fields, found, targets in cases():
        tables = [metric.of_rows([outputs], fields) for metric in metrics]
        assert {len(table) for table in tables} == {len(outputs)}
        totals = Totals(0.0, float(len(targets)), 0)
        ours = {
            metric.name: metric.value(table.sum(0), totals)
            for metric, table in zip(metrics, tables, strict=True)
        }
        whole = precision_recall_fscore_support(targets, found, average="macro", zero_division=0)
        accuracy = (found == targets).mean()
        theirs = {
            "accuracy": accuracy,
            **dict(zip(("precision", "recall", "macro-f1"), map(float, whole[:3]), strict=True)),
            # Of one class a row, precision, recall and F1 over all decisions are alike.
            "micro-f1": accuracy,
            "confusion-matrix": accuracy,
        }
        assert ours == pytest.approx(theirs, abs=1e-12)
        classes, table = range(outputs.shape[-1]), metrics[-1].table(tables[-1].sum(0))
        pairs = list(zip(targets.tolist(), found.tolist(), strict=True))
        assert table == [[pairs.count((there, each)) for each in classes] for there in classes]
        # scikit-learn takes some milliseconds for it.
        if len(pairs) % 10 == 0:
            assert table == confusion_matrix(targets, found, labels=list(classes)).tolist()


def test_sets_of_classes_equal_scikit_learn() -> None:
    chance, metrics = np.random.default_rng(9), make_metrics(NAMES[1:5])
    for _ in range(200):
        rows, classes = int(chance.integers(1, 20)), int(chance.integers(1, 5))
        outputs = chance.normal(size=(rows, classes + 1))
        targets = (chance.random((rows, classes)) < 0.4).astype(np.float32)
        ours = [
            metric.value(metric.of_rows([outputs], {"targets": targets}).sum(0), TOTALS)
            for metric in metrics
        ]
        found = outputs[:, :classes] > 0
        # Ours leave out a class that is neither found nor there.
        known = (found | (targets > 0)).any(0)
        if not known.any():
            continue
        given = {"zero_division": 0}
        macro = (
            precision_recall_fscore_support(
                targets[:, known] > 0, found[:, known], average="macro", **given
            )
            if known.sum() > 1
            else None
        )
        micro = precision_recall_fscore_support(targets > 0, found, average="micro", **given)
        if macro is not None:
            assert ours[:3] == pytest.approx(list(map(float, macro[:3])), abs=1e-12)
        if classes > 1:
            assert ours[3] == pytest.approx(float(micro[2]), abs=1e-12)


def test_a_table_of_too_many_classes_is_refused() -> None:
    make_metrics(["confusion-matrix"], [str(number) for number in range(200)])
    with pytest.raises(UsageError, match=r"up to 200, and the data has 1,000; take precision"):
        make_metrics(["confusion-matrix"], [str(number) for number in range(1000)])
