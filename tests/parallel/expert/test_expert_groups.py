"""How many ranks may share the experts, and what the errors say."""

import pytest

from mpillm.errors import LayoutError
from mpillm.models.decoder import DecoderConfig
from mpillm.parallel.expert.expert_groups import check_experts, own_experts

MIXTURE = DecoderConfig(layers=2, width=16, heads=2, vocab_size=40, hidden=16, experts=8)
PLAIN = DecoderConfig(layers=2, width=16, heads=2, vocab_size=40)


def test_each_expert_has_one_owner() -> None:
    for ranks in (1, 2, 4, 8):
        owned = [own_experts(8, ranks, rank) for rank in range(ranks)]
        assert [number for each in owned for number in each] == list(range(8))


def test_what_divides_ranks_and_experts_is_legal() -> None:
    for ranks in (1, 2, 4):
        check_experts(ranks, MIXTURE, {"data": 4, "pipeline": 2})
    check_experts(1, PLAIN, {"data": 4, "pipeline": 2}, fixed_order=True)


@pytest.mark.parametrize(
    ("ranks", "data", "words"),
    [
        (3, 6, r"parallel\.experts = 3 must divide the 6 .*data=6.* the 8 experts.*take 1 or 2$"),
        (8, 4, r"parallel\.experts = 8 .*the 4 rank.*take 1 or 2 or 4$"),
        (2, 1, r"parallel\.experts = 2 .*the 1 rank.*take 1$"),
    ],
)
def test_another_number_is_refused_with_the_nearest(ranks: int, data: int, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        check_experts(ranks, MIXTURE, {"data": data, "pipeline": 1})


def test_what_does_not_compose_is_refused_with_the_reason() -> None:
    sizes = {"data": 2, "pipeline": 1}
    with pytest.raises(LayoutError, match=r"experts = 2 .*the model has none; leave it out"):
        check_experts(2, PLAIN, sizes)
    with pytest.raises(LayoutError, match=r"fixed_order .*parallel\.experts = 2 .*2 ranks at once"):
        check_experts(2, MIXTURE, sizes, fixed_order=True)
    with pytest.raises(LayoutError, match=r"noise_scale .*parallel\.experts = 2 "):
        check_experts(2, MIXTURE, sizes, noise_scale=True)
    with pytest.raises(LayoutError, match=r"parallel\.tensor = 2 cuts each expert"):
        check_experts(2, MIXTURE, {**sizes, "tensor": 2})
