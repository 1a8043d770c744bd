"""Bytes of both kinds of context parallelism, and the choice between them."""

import pytest

from mpillm.errors import LayoutError
from mpillm.parallel.context.context_traffic import attention_bytes, cheaper_kind, choose_kind

MANY, GROUPED = (8, 8, 64), (32, 8, 64)


def test_a_ring_takes_all_others_keys_and_values():
    forward, backward = attention_bytes("ring", 4, MANY, 1000)
    kv = 2 * 1000 * 8 * 64 * 4
    assert forward == kv * 3 / 4
    # Keys and values again, and their gradients.
    assert backward == 2 * forward
    assert attention_bytes("ring", 4, MANY, 1000, 2, 4) == (forward / 2, forward / 2 + forward)


def test_heads_take_the_share_of_others_of_four_tensors():
    forward, backward = attention_bytes("ulysses", 4, GROUPED, 1000)
    assert forward == backward == 2 * (32 + 8) * 64 * 4 * 250 * 3 / 4


def test_the_cheaper_kind():
    assert cheaper_kind(2, MANY) == "ulysses"
    assert cheaper_kind(2, GROUPED) == "ring"
    assert cheaper_kind(8, GROUPED) == "ulysses"
    # The ranks do not divide the heads.
    assert cheaper_kind(3, MANY) == cheaper_kind(16, GROUPED) == "ring"


def test_a_wanted_kind_is_taken_or_refused():
    assert choose_kind("auto", 2, MANY) == choose_kind("ulysses", 2, MANY) == "ulysses"
    assert choose_kind("ring", 2, MANY) == "ring"
    with pytest.raises(LayoutError, match="3 context ranks do not divide 8 heads"):
        choose_kind("ulysses", 3, MANY)
