"""The dynamic loss scale: halved by an overflow, doubled after many steps, restored exactly."""

import math

import pytest

from mpillm.train import loss_scale
from mpillm.train.loss_scale import GROWTH_STEPS, LARGEST, LossScale


def test_it_halves_and_doubles() -> None:
    scale = LossScale.make(True)
    first = scale.value
    assert scale.lower()
    assert scale.value == first / 2
    for _ in range(GROWTH_STEPS):
        scale.step_taken()
    assert scale.value == first
    assert scale.since_change == 0


def test_it_stays_between_one_and_the_largest() -> None:
    scale = LossScale.make(True)
    lowered = 0
    while scale.lower():
        lowered += 1
    assert lowered == math.log2(loss_scale.FIRST)
    assert scale.value == 1.0
    scale.value = LARGEST
    for _ in range(GROWTH_STEPS):
        scale.step_taken()
    assert scale.value == LARGEST


def test_without_need_it_is_one() -> None:
    scale = LossScale.make(False)
    scale.step_taken()
    assert not scale.lower()
    assert (scale.value, scale.facts()) == (1.0, {})


def test_it_is_restored() -> None:
    scale, again = LossScale.make(True), LossScale.make(True)
    scale.lower()
    scale.step_taken()
    again.restore(scale.facts())
    assert again == scale


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"loss_scale": 3},
        {"loss_scale": [0.5, 1]},
        {"loss_scale": [math.inf, 1]},
        {"loss_scale": [4.0, -1]},
        {"loss_scale": ["4", 1]},
        {"loss_scale": [4.0]},
    ],
)
def test_a_damaged_record_begins_anew(facts: dict[str, object]) -> None:
    scale = LossScale.make(True)
    scale.restore(facts)
    assert scale == LossScale.make(True)
