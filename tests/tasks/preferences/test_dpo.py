"""DPO's loss and gradient against the formula in plain torch; fields; metrics."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpillm.errors import RecipeError
from mpillm.models.linear_head import LinearHead
from mpillm.tasks.metrics.rewards import PreferenceAccuracy, RewardMargin
from mpillm.tasks.task_catalog import TaskSettings, make_task

VOCABULARY, LENGTH = 11, 15
# Documents of a row as (tokens, first learnt one): two pairs and padding; one pair in a full row.
ROWS = [[(4, 2), (3, 1), (3, 2), (4, 1)], [(9, 4), (7, 4)]]


def raw_rows() -> dict[str, np.ndarray[Any, Any]]:
    draw = np.random.default_rng(3)
    shape = len(ROWS), LENGTH + 1
    tokens = draw.integers(1, VOCABULARY, shape)
    found = {
        "tokens": tokens,
        "supervised": np.zeros(shape, np.uint8),
        "documents": np.zeros(shape, np.int64),
        "rejected": np.zeros(shape, np.uint8),
        "reference": np.zeros(shape),
    }
    for row, documents in enumerate(ROWS):
        place = 0
        for number, (count, first) in enumerate(documents):
            found["documents"][row, place : place + count] = number
            found["supervised"][row, place + first : place + count] = 1
            found["rejected"][row, place : place + count] = number % 2
            found["reference"][row, place] = -draw.uniform(1, 9)
            place += count
        found["documents"][row, place:] = len(documents)
    return found


def formula(logits_BTV: Tensor, beta: float, smoothing: float) -> Tensor:
    """Equation 7 of Rafailov et al. 2023, pair by pair, with the smoothing of conservative DPO."""
    raw, losses = raw_rows(), []
    for row, documents in enumerate(ROWS):
        ratios, place = [], 0
        for count, first in documents:
            ids = torch.from_numpy(raw["tokens"][row, place + first : place + count])
            logs = logits_BTV[row, place + first - 1 : place + count - 1].log_softmax(-1)
            answer = logs.gather(1, ids[:, None]).sum()
            ratios.append(answer - raw["reference"][row, place])
            place += count
        for chosen, rejected in zip(ratios[::2], ratios[1::2], strict=True):
            margin = beta * (chosen - rejected)
            own = (1 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin)
            losses.append(-own)
    return torch.stack(losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("as_head", [True, False], ids=["head", "logits"])
def test_loss_and_gradients_are_those_of_the_formula(as_head: bool, smoothing: float) -> None:
    torch.manual_seed(1)
    hidden, linear = torch.randn(2, LENGTH, 6), nn.Linear(6, VOCABULARY)
    task = make_task("dpo", TaskSettings("dpo", beta=0.3, label_smoothing=smoothing))
    fields = task.fields(raw_rows())
    found: list[tuple[float, list[Tensor]]] = []
    for expected in (True, False):
        leaf = hidden.clone().requires_grad_()
        linear.zero_grad()
        if expected:
            loss = formula(linear(leaf), 0.3, smoothing).sum()
        else:
            output = LinearHead.of(leaf, linear) if as_head else linear(leaf)
            loss = task.objective_sum((output,), fields)
        (loss / 3).backward()
        assert leaf.grad is not None
        gradients = [leaf.grad, *(each.grad.clone() for each in linear.parameters())]
        found.append((loss.item(), gradients))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_rows_have_their_own_losses_and_pairs() -> None:
    torch.manual_seed(2)
    logits = torch.randn(2, LENGTH, VOCABULARY)
    task = make_task("dpo")
    fields = task.fields(raw_rows())
    assert task.row_weights(fields, 2) == [2, 1]
    assert task.weight(fields) == 3
    with torch.inference_mode():
        rows, total = task.row_losses((logits,), fields), task.loss_sum((logits,), fields)
    losses = formula(logits, 0.1, 0.0)
    torch.testing.assert_close(rows.float(), torch.stack([losses[:2].sum(), losses[2]]))
    torch.testing.assert_close(total, losses.sum())


def test_rewards_of_a_row_and_their_metrics() -> None:
    torch.manual_seed(2)
    logits = torch.randn(2, LENGTH, VOCABULARY)
    task = make_task("dpo", TaskSettings("dpo", beta=0.5))
    fields = {name: each[1:] for name, each in task.fields(raw_rows()).items()}
    [rewards] = task.metric_outputs((logits[1:],), fields)
    [loss] = formula(logits, 0.5, 0.0)[2:]
    assert -F.logsigmoid(rewards[0, 0] - rewards[0, 1]).item() == pytest.approx(loss.item())


def test_metrics_of_rewards() -> None:
    """An answer without another one is compared with 0."""
    from mpillm.tasks.metrics.metric import Totals

    nan = float("nan")
    rewards = np.array([[1.0, 0.5], [0.1, 0.4], [0.2, nan], [nan, 0.3], [nan, -0.1]])
    totals = Totals(0.0, 5.0, 0.0)
    accuracy, margin = PreferenceAccuracy(), RewardMargin()
    assert accuracy.value(accuracy.of_rows([rewards], {}).sum(0), totals) == pytest.approx(0.6)
    sums = margin.of_rows([rewards], {}).sum(0)
    assert margin.value(sums, totals) == pytest.approx(1.3 / 3 - 1.1 / 4)
    assert np.isnan(margin.value(np.zeros(4), totals))


def test_settings_that_it_does_not_take_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"task\.z_loss = 0\.001 changes a cross-entropy, and"):
        make_task("dpo", TaskSettings("dpo", z_loss=0.001, label_smoothing=0.1))
