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


def test_a_table_of_too_many_classes_is_refused() -> None:
    make_metrics(["confusion-matrix"], [str(number) for number in range(200)])
    with pytest.raises(UsageError, match=r"up to 200, and the data has 1,000; take precision"):
        make_metrics(["confusion-matrix"], [str(number) for number in range(1000)])
