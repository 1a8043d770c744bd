import itertools
import json

import pytest
import torch

from mpillm.errors import LayoutError, RecipeError
from mpillm.models.decoder import DecoderConfig
from mpillm.models.part_module import create, weight_shapes
from mpillm.train.lr_schedule import cycle, learning_rate
from mpillm.train.optimizers.adamw import AdamWSettings
from mpillm.train.optimizers.muon import MuonSettings
from mpillm.train.optimizers.optimizer import (
    GroupRule,
    OptimizerSettings,
    check_rules,
    check_whole,
    make_optimizer,
    set_rate,
    set_steps,
)
from mpillm.train.optimizers.optimizer_catalog import OPTIMIZERS, optimizer_class
from mpillm.train.recipe import parse_recipe
from mpillm.train.resuming import rising_rate
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


RESTARTS = {"schedule": "cosine-restarts", "period": 10}


def test_restarts_begin_each_cycle_at_the_top_and_end_it_at_the_final_share() -> None:
    found = rates(10 + 10 + 20 + 40, **RESTARTS)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    tops = [step for step, rate in enumerate(found) if rate == 1.0]
    # Step 9 ends the warm-up.
    assert tops == [9, 10, 20, 40]
    assert [found[step] for step in (19, 39, 79)] == pytest.approx([0.1] * 3)
    for first, last in ((10, 19), (20, 39), (40, 79)):
        assert all(a >= b for a, b in itertools.pairwise(found[first : last + 1]))
    equal = rates(40, **RESTARTS, period_factor=1.0)
    assert equal[10:20] == equal[20:30] == equal[30:40]
    # The first cycle is the cosine of a run of its length.
    assert found[:20] == rates(20, schedule="cosine")


def test_a_longer_run_keeps_its_cycles() -> None:
    assert rates(200, **RESTARTS)[:77] == rates(77, **RESTARTS)


@pytest.mark.parametrize(("period", "factor"), [(1, 1.0), (7, 1.1), (3, 1.5), (1, 10.0), (5, 2.0)])
def test_cycles_join_without_a_gap(period: int, factor: float) -> None:
    begin = end = 0
    for step in range(2000):
        if step == end:
            begin, end = cycle(step, period, factor)
            assert begin == step
        assert cycle(step, period, factor) == (begin, end)
        assert begin <= step < end
    assert cycle(period, period, factor)[1] == round(period * (1 + factor))
    assert cycle(2**62, period, factor)[1] > 2**62


def test_restarts_need_a_period() -> None:
    with pytest.raises(RecipeError, match=r"optimizer\.period is 0; set it to a number of steps"):
        AdamWSettings(schedule="cosine-restarts")


def resumed(done: int, before: dict[str, object], now: dict[str, object]) -> str:
    """Say what a run prints of its rate that continues after `done` steps."""

    def table(settings: dict[str, object]) -> dict[str, dict[str, object]]:
        optimizer = {"warmup_steps": 10, **RESTARTS, **settings}
        train = {"steps": optimizer.pop("steps", 80)}
        return {"data": {"path": "x"}, "optimizer": optimizer, "train": train}

    recipes = [parse_recipe(table(settings), "x") for settings in (before, now)]
    return rising_rate(json.loads(json.dumps(recipes[0].to_dict())), recipes[1], done)


def test_a_planned_restart_is_no_rise() -> None:
    for done in (10, 19, 20, 21, 40):
        assert resumed(done, {}, {}) == ""
        assert resumed(done, {}, {"steps": 200}) == ""
    assert "rises from 0.0001 at step 20 to 0.002 at step 21" in resumed(
        20, {}, {"learning_rate": 2e-3}
    )
    assert "rises" in resumed(39, {}, {"period": 29})


def test_short_runs_have_rates_too() -> None:
    assert rates(1, schedule="cosine") == [0.1]
    assert len(rates(5)) == 5


def test_decay_acts_on_matrices_only() -> None:
    model = create(
        DecoderConfig(layers=1, width=16, heads=2, vocab_size=20, context=8, bias=True), seed=0
    )
    optimizer = AdamWSettings(learning_rate=0.1, weight_decay=0.5).build(
        dict(model.named_parameters())
    )
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in model.named_parameters():
        shrunk = before[name] * (1 - 0.1 * 0.5) if weight.dim() > 1 else before[name]
        torch.testing.assert_close(weight.detach(), shrunk)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_a_new_optimizer_is_whole(name: str) -> None:
    """Two steps equal one step, its state carried over by name, and another step."""
    config = DecoderConfig(layers=1, width=16, heads=2, vocab_size=20, context=8)
    ids = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(0))

    def step(model, optimizer) -> None:  # type: ignore[no-untyped-def]
        optimizer.zero_grad()
        model(ids[:, :-1]).square().mean().backward()
        optimizer.step()

    model = create(config, 0)
    settings = optimizer_class(name)()
    optimizer = settings.build(dict(model.named_parameters()))
    step(model, optimizer)
    other = create(config, 1)
    other.load_state_dict(model.state_dict())
    carried = settings.build(dict(other.named_parameters()))
    set_steps(carried, 1)
    held = dict(model.named_parameters())
    given = name_tensors(held, held, optimizer.state, settings.slots)
    others = dict(other.named_parameters())
    taken = name_tensors(others, others, carried.state, settings.slots)
    for key, tensor in taken.items():
        if key.startswith("optimizer/"):
            tensor.copy_(given[key])
    step(model, optimizer)
    step(other, carried)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


SPEC = DecoderConfig(layers=2, width=16, heads=2, vocab_size=20, context=8, bias=True)
RULES = (
    GroupRule("embedding.*", rate=0.1, decay=0.0),
    GroupRule("layers.1.*", rate=0.0),
    GroupRule("*.bias", decay=0.5),
)


def test_the_first_rule_that_matches_sets_rate_and_decay() -> None:
    weights = dict(create(SPEC, 0).named_weights())
    groups = AdamWSettings(groups=RULES).parameter_groups(weights, 0.1)
    names = {weight: name for name, weight in weights.items()}
    found = {
        names[weight]: (group["rate"], group["weight_decay"])
        for group in groups
        for weight in group["params"]
    }
    assert len(found) == len(weights)
    assert found["embedding.weight"] == (0.1, 0.0)
    assert found["layers.0.attention.query.weight"] == (1.0, 0.1)
    assert found["layers.0.attention.query.bias"] == (1.0, 0.5)
    assert found["layers.0.attention_norm.weight"] == (1.0, 0.0)
    # The second rule sets no decay: that of matrices and vectors stays.
    assert found["layers.1.attention.query.weight"] == (0.0, 0.1)
    assert found["layers.1.attention.query.bias"] == (0.0, 0.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_follows_the_rules(name: str) -> None:
    """A tenth of the rate is a tenth of the step; a rate of 0 changes nothing."""
    moved = []
    for rules in ((), RULES):
        settings = optimizer_class(name)(weight_decay=0.0, groups=rules)  # type: ignore[call-arg]
        weights = dict(create(SPEC, 0).named_weights())
        optimizer = make_optimizer(settings, weights)
        set_rate(optimizer, 0.01)
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        for weight in weights.values():
            weight.grad = weight.detach() + 0.1
        optimizer.step()
        moved.append({name: weight.detach() - before[name] for name, weight in weights.items()})
    plain, ruled = moved
    for key, step in ruled.items():
        if key.startswith("layers.1."):
            assert not step.any()
        elif key.startswith("embedding"):
            torch.testing.assert_close(step, plain[key] / 10, rtol=1e-3, atol=1e-7)
        elif not key.endswith("bias"):
            torch.testing.assert_close(step, plain[key])


NAMES = list(weight_shapes(SPEC))


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (["layers.0.*"], ""),
        (["layers.1.*", "*"], ""),
        (["layer.*.weight"], r"groups\[0\]\.match = 'layer\.\*\.weight' matches no weight of the "),
        (["embeding.weight"], r"the nearest names are embedding\.weight"),
        (["layers.*.attention.qurey.*"], r"layers\.\*\.attention\.query\.weight"),
        (["*", "embedding.*"], r"groups\[1\].* matches only weights that earlier rules match"),
        (["head.*"], r"matches head\.weight, which is the weight embedding\.weight"),
    ],
)
def test_a_rule_that_no_weight_follows_is_refused(rules: list[str], words: str) -> None:
    made = [GroupRule(rule) for rule in rules]
    if not words:
        check_rules(made, NAMES, SPEC.tied_weights)
        return
    with pytest.raises(RecipeError, match=words):
        check_rules(made, NAMES, SPEC.tied_weights)


class WithoutGroups(AdamWSettings):
    def build(self, weights):  # type: ignore[no-untyped-def]
        return torch.optim.SGD(weights.values())


def test_a_plug_in_that_makes_no_groups_takes_no_rules() -> None:
    weights = dict(create(SPEC, 0).named_weights())
    make_optimizer(WithoutGroups(), weights)
    with pytest.raises(RecipeError, match="makes no groups of weights; leave the rules out"):
        make_optimizer(WithoutGroups(groups=RULES), weights)


@pytest.mark.parametrize("kind", [AdamWSettings, MuonSettings])
def test_a_cut_weight_is_refused_where_whole_ones_are_needed(
    kind: type[OptimizerSettings],
) -> None:
    whole = {name: shape for name, (_, shape) in weight_shapes(SPEC).items()}
    check_whole(kind(), whole, whole)
    cut = {**whole, "layers.0.attention.query.weight": (8, 16)}
    if kind.elementwise:
        check_whole(kind(), cut, whole)
        return
    words = (
        r"muon needs whole weights.*cuts layers\.0\.attention\.query\.weight from \[16, 16\] to "
    )
    with pytest.raises(LayoutError, match=words):
        check_whole(kind(), cut, whole)
