"""KTO's loss and gradient against the formula in plain torch."""

import pytest
import torch
from torch import Tensor, nn

from mpillm.models.linear_head import LinearHead
from mpillm.tasks.task_catalog import TaskSettings, make_task
from tests.tasks.preferences.test_dpo import LENGTH, ROWS, VOCABULARY, raw_rows

BETA, POINT, DESIRABLE, UNDESIRABLE = 0.3, 0.7, 1.5, 0.5


def formula(logits_BTV: Tensor, point: float) -> Tensor:
    """Section 4.1 of Ethayarajh et al. 2024, as λ − v(x, y), answer by answer."""
    raw, losses = raw_rows(), []
    for row, documents in enumerate(ROWS):
        place = 0
        for number, (count, first) in enumerate(documents):
            ids = torch.from_numpy(raw["tokens"][row, place + first : place + count])
            logs = logits_BTV[row, place + first - 1 : place + count - 1].log_softmax(-1)
            ratio = logs.gather(1, ids[:, None]).sum() - raw["reference"][row, place]
            if number % 2:
                losses.append(UNDESIRABLE - UNDESIRABLE * torch.sigmoid(BETA * (point - ratio)))
            else:
                losses.append(DESIRABLE - DESIRABLE * torch.sigmoid(BETA * (ratio - point)))
            place += count
    return torch.stack(losses)


@pytest.mark.parametrize("point", [0.0, POINT])
def test_loss_and_gradients_are_those_of_the_formula(point: float) -> None:
    torch.manual_seed(1)
    hidden, linear = torch.randn(2, LENGTH, 6), nn.Linear(6, VOCABULARY)
    settings = TaskSettings(
        "kto", beta=BETA, desirable_weight=DESIRABLE, undesirable_weight=UNDESIRABLE
    )
    task = make_task("kto", settings)
    fields = task.fields(raw_rows())
    if point:
        fields["baseline"] = torch.full((2, 1), point, dtype=torch.float64)
    found: list[tuple[float, list[Tensor]]] = []
    for expected in (True, False):
        leaf = hidden.clone().requires_grad_()
        linear.zero_grad()
        if expected:
            loss = formula(linear(leaf), point).sum()
        else:
            loss = task.objective_sum((LinearHead.of(leaf, linear),), fields)
        loss.backward()
        assert leaf.grad is not None
        found.append((loss.item(), [leaf.grad, *(p.grad.clone() for p in linear.parameters())]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    assert task.row_weights(fields, 2) == [4, 2]


def test_the_reward_is_on_the_side_of_the_label() -> None:
    task = make_task("kto")
    logits = torch.randn(2, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(4))
    raw = raw_rows()
    raw["rejected"][0] = 1
    fields = task.fields(raw)
    [rewards] = task.metric_outputs((logits,), fields)
    assert rewards.isnan().tolist() == [[True, False], [False, True]]
    ratios = task.log_ratios((logits,), fields)[:, 0]
    assert rewards[[0, 1], [1, 0]].tolist() == pytest.approx((0.1 * ratios).tolist())
