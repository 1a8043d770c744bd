import numpy as np

from mpillm.tasks.metrics.accuracy import Accuracy
from mpillm.tasks.metrics.metric import Totals


def test_the_share_of_counted_targets_is_that_of_a_loop() -> None:
    chance = np.random.default_rng(3)
    outputs, targets = chance.normal(size=(4, 7, 5)), chance.integers(0, 5, (4, 7))
    counts = chance.random((4, 7)) < 0.5
    expected = sum(
        max(range(5), key=lambda token: outputs[row, place, token]) == targets[row, place]
        for row, place in np.argwhere(counts)
    )
    rows = Accuracy().of_rows([outputs], {"targets": targets, "counts": counts})
    assert rows.shape == (4, 1)
    assert 0 < rows.sum() == expected
    totals = Totals(1.0, float(counts.sum()), 0)
    assert Accuracy().value(rows.sum(0), totals) == expected / counts.sum()


def test_classes_of_whole_rows_all_count() -> None:
    outputs = np.eye(4)[[0, 1, 2, 2]]
    rows = Accuracy().of_rows([outputs], {"targets": np.arange(4)})
    assert rows.tolist() == [[1], [1], [1], [0]]
