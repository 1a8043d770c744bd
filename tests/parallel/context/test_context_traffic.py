"""Bytes of both kinds of context parallelism, and the choice between them."""

import pytest

from mpillm.errors import LayoutError
from mpillm.parallel.context.context_traffic import (
    attention_bytes,
    cheaper_kind,
    choose_kind,
    exchanges_heads,
    own_heads,
)

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


def test_tensor_ranks_have_fewer_heads():
    assert own_heads(GROUPED, 2) == (16, 4, 64)
    # Two ranks name a head for each head of queries, and one attends to two.
    assert own_heads((12, 4, 8), 3) == (4, 4, 8)
    assert exchanges_heads(2, (12, 4, 8), 3)
    assert not exchanges_heads(4, (12, 4, 8), 3)
    assert cheaper_kind(4, (12, 4, 8), 3) == "ring"


def test_gpus_exchange_heads_or_are_refused_once():
    # On a CPU the ring moves fewer bytes.
    assert choose_kind("auto", 2, GROUPED, device="cuda") == "ulysses"
    for wanted in ("auto", "ring", "ulysses"):
        with pytest.raises(LayoutError, match=r"on GPUs .* parallel.context = 1 or 2 or 4$"):
            choose_kind(wanted, 3, GROUPED, 2, "cuda")
    with pytest.raises(LayoutError, match='on GPUs take "ulysses"'):
        choose_kind("ring", 2, GROUPED, device="cuda")
