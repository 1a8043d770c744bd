"""GRPO's loss and gradient against the formula in plain torch; advantages; fields."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpillm.errors import RecipeError
from mpillm.models.linear_head import LinearHead
from mpillm.tasks.grpo import Written, advantages_of, alike, answer_fields, divergences
from mpillm.tasks.task_catalog import TaskSettings, make_task

VOCABULARY, KL, CLIP = 11, 0.3, 0.2
# Prompts and answers of unequal lengths: the second row is the longest.
ROWS = [([1, 2], [3, 4, 5]), ([6], [7, 8, 9, 10, 1]), ([2, 3, 4], [5])]


def raw_fields(updates: int) -> dict[str, Tensor]:
    draw = np.random.default_rng(3)
    written = [Written(p, a, draw.uniform(-4, -1, len(a)).tolist()) for p, a in ROWS]
    fields = answer_fields(written, padding=0)
    noise = torch.from_numpy(draw.uniform(-0.5, 0.5, fields["drawn"].shape))
    fields["reference"] = (fields["drawn"] + noise) * fields["counts"]
    fields["advantages"] = torch.tensor([[1.2], [-0.7], [0.4]], dtype=torch.float64)
    if updates == 1:
        del fields["drawn"]
    return fields


def formula(logits_BTV: Tensor, fields: dict[str, Tensor], temperature: float) -> Tensor:
    """Equations 3 and 4 of Shao et al. 2024, token by token; the loss of each answer."""
    losses = []
    for row, (prompt, answer) in enumerate(ROWS):
        tokens = []
        for place, token in enumerate(answer, len(prompt) - 1):
            log = (logits_BTV[row, place].double() / temperature).log_softmax(-1)[token]
            old = fields["drawn"][row, place] if "drawn" in fields else log.detach()
            ratio, advantage = torch.exp(log - old), fields["advantages"][row, 0]
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            gain = torch.min(ratio * advantage, clipped * advantage)
            inverse = torch.exp(fields["reference"][row, place] - log)
            tokens.append(-(gain - KL * (inverse - inverse.log() - 1)))
        losses.append(torch.stack(tokens).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize(("form", "temperature"), [("head", 0.7), ("capped", 0.7), ("logits", 1.0)])
def test_loss_and_gradients_are_those_of_the_formula(
    form: str, temperature: float, updates: int
) -> None:
    torch.manual_seed(1)
    fields = raw_fields(updates)
    hidden = 2 * torch.randn(3, fields["ids"].shape[1], 6)
    linear, cap = nn.Linear(6, VOCABULARY), 2.0 if form == "capped" else 0.0
    settings = TaskSettings("grpo", kl=KL, clip=CLIP, temperature=temperature, updates=updates)
    task = make_task("grpo", settings)
    found: list[tuple[float, list[Tensor]]] = []
    for expected in (True, False):
        leaf = hidden.clone().requires_grad_()
        linear.zero_grad()
        head = LinearHead.of(leaf, linear, cap)
        if expected:
            loss = formula(head.logits(), fields, temperature).sum()
        else:
            output = head.logits() if form == "logits" else head
            loss = task.objective_sum((output,), fields)
        (loss / 3).backward()
        assert leaf.grad is not None
        found.append(
            (loss.item(), [leaf.grad, *(each.grad.clone() for each in linear.parameters())])
        )
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        rows = task.row_losses((head.logits(),), fields)
    expected_B = formula(head.logits(), fields, temperature).detach()
    torch.testing.assert_close(rows, expected_B, rtol=1e-6, atol=1e-5)
    assert task.weight(fields) == task.fixed_weight(3, 99) == 3


def test_rows_of_an_evaluation_have_the_loss_of_chat() -> None:
    fields = {name: raw_fields(1)[name] for name in ("ids", "targets", "counts")}
    logits = torch.randn(*fields["ids"].shape, VOCABULARY)
    grpo, chat = make_task("grpo"), make_task("chat")
    torch.testing.assert_close(
        grpo.row_losses((logits,), fields), chat.row_losses((logits,), fields)
    )
    assert grpo.weight(fields) == chat.weight(fields) == 9


def test_answers_are_what_counts_in_rows_as_long_as_the_longest() -> None:
    fields = raw_fields(2)
    assert fields["ids"].shape == (3, 5)
    for row, (prompt, answer) in enumerate(ROWS):
        counted = fields["targets"][row][fields["counts"][row]]
        assert counted.tolist() == answer
        assert fields["ids"][row, : len(prompt)].tolist() == prompt
    assert not fields["drawn"][~fields["counts"]].any()


def test_advantages_are_normalised_in_the_group() -> None:
    rewards = np.array([1.0, 0, 0, 0, 0.1, 0.1, 0.1, 0.1, 2, -2, 2, -2])
    found = advantages_of(rewards, 4).reshape(3, 4)
    assert found[0] == pytest.approx([1.49970006, -0.49990002, -0.49990002, -0.49990002])
    # Rounding would make 0.1 differ from the mean of four of them.
    assert found[1].tolist() == [0, 0, 0, 0]
    assert found[2].sum() == pytest.approx(0)
    assert alike(rewards.reshape(3, 4)).tolist() == [False, True, False]


def test_a_small_divergence_is_not_lost() -> None:
    small = torch.tensor([1e-5, -1e-5, 0.0], dtype=torch.float64)
    assert divergences(small).tolist() == pytest.approx([5e-11, 5e-11, 0.0], rel=1e-4)


def test_settings_that_it_does_not_take_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"task\.label_smoothing = 0\.1 changes a cross-entropy"):
        make_task("grpo", TaskSettings("grpo", label_smoothing=0.1))
