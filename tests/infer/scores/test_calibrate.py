"""The temperature of logits, compared with a search over a grid."""

import numpy as np
import pytest

from mpillm.errors import UsageError
from mpillm.infer.scores.calibrate import check_calibrates, fit_temperature
from mpillm.tasks.causal_lm import CausalLM
from mpillm.tasks.sequence_classification import SequenceClassification


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    logits = logits - logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-logs[np.arange(len(targets)), targets].mean())


@pytest.mark.parametrize("factor", [0.2, 1.0, 4.0])
def test_the_temperature_has_the_least_cross_entropy(factor: float) -> None:
    chance = np.random.default_rng(0)
    logits = chance.normal(size=(4000, 3))
    targets = (logits + chance.gumbel(size=logits.shape)).argmax(1)
    found = fit_temperature(factor * logits, targets)
    # The targets are drawn of the softmax itself.
    assert found == pytest.approx(factor, rel=0.1)
    grid = np.geomspace(0.01, 100, 2001)
    losses = [cross_entropy(factor * logits / each, targets) for each in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.01)


def test_logits_that_are_always_right_take_the_lowest_temperature() -> None:
    targets = np.arange(20) % 4
    assert fit_temperature(np.eye(4)[targets], targets) == pytest.approx(0.01)


def test_a_task_without_classes_of_rows_is_refused() -> None:
    check_calibrates(SequenceClassification())
    with pytest.raises(UsageError, match="the task causal-lm gives next tokens; leave it out"):
        check_calibrates(CausalLM())
