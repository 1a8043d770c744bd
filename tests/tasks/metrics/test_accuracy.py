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
    [hits] = Accuracy().of_batch([outputs], {"targets": targets, "counts": counts})
    assert 0 < hits == expected
    totals = Totals(1.0, float(counts.sum()), 0)
    assert Accuracy().value([hits], totals) == expected / counts.sum()


def test_classes_of_whole_rows_all_count() -> None:
    outputs = np.eye(4)[[0, 1, 2, 2]]
    assert Accuracy().of_batch([outputs], {"targets": np.arange(4)}) == [3.0]
