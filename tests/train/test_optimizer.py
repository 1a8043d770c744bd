import itertools

import pytest
import torch

from mpillm.models.decoder import DecoderConfig
from mpillm.models.part_module import create
from mpillm.train.lr_schedule import learning_rate
from mpillm.train.optimizers.adamw import AdamWSettings
from mpillm.train.optimizers.optimizer import set_steps
from mpillm.weights.names import name_tensors


def rates(steps: int = 100, **settings: object) -> list[float]:
    chosen = AdamWSettings(learning_rate=1.0, warmup_steps=10, final_share=0.1, **settings)  # type: ignore[arg-type]
    return [learning_rate(chosen, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant-then-decay"])
def test_rates_warm_up_and_end_at_the_final_share(schedule: str) -> None:
    found = rates(schedule=schedule)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(found) == pytest.approx(1.0)
    assert found[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(found[9:]))


def test_the_middle_of_each_schedule() -> None:
    steps = 10 + 91
    assert rates(steps, schedule="cosine")[55] == pytest.approx(0.55, abs=0.01)
    assert rates(steps, schedule="linear")[55] == pytest.approx(0.55, abs=0.01)
    assert rates(schedule="constant-then-decay", decay_share=0.2)[79] == 1.0
    assert rates(schedule="constant-then-decay", decay_share=0.2)[90] == pytest.approx(
        0.55, abs=0.05
    )


def test_short_runs_have_rates_too() -> None:
    assert rates(1, schedule="cosine") == [0.1]
    assert len(rates(5)) == 5


def test_decay_acts_on_matrices_only() -> None:
    model = create(
        DecoderConfig(layers=1, width=16, heads=2, vocab_size=20, context=8, bias=True), seed=0
    )
    optimizer = AdamWSettings(learning_rate=0.1, weight_decay=0.5).build(model.parameters())
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in model.named_parameters():
        shrunk = before[name] * (1 - 0.1 * 0.5) if weight.dim() > 1 else before[name]
        torch.testing.assert_close(weight.detach(), shrunk)


def test_the_state_of_a_new_optimizer_is_whole() -> None:
    """Two steps equal one step, its state carried over by name, and another step."""
    config = DecoderConfig(layers=1, width=16, heads=2, vocab_size=20, context=8)
    ids = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(0))

    def step(model, optimizer) -> None:  # type: ignore[no-untyped-def]
        optimizer.zero_grad()
        model(ids[:, :-1]).square().mean().backward()
        optimizer.step()

    model = create(config, 0)
    optimizer = AdamWSettings().build(model.parameters())
    step(model, optimizer)
    other = create(config, 1)
    other.load_state_dict(model.state_dict())
    carried = AdamWSettings().build(other.parameters())
    set_steps(carried, 1)
    slots = AdamWSettings.slots
    held = dict(model.named_parameters())
    given = name_tensors(held, held, optimizer.state, slots)
    others = dict(other.named_parameters())
    taken = name_tensors(others, others, carried.state, slots)
    for name, tensor in taken.items():
        if name.startswith("optimizer/"):
            tensor.copy_(given[name])
    step(model, optimizer)
    step(other, carried)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
