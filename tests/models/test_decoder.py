import itertools
import math

import pytest
import torch
from torch import Tensor

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.attention import attend
from mpillm.models.linear_head import plain_outputs
from mpillm.models.part_module import create
from mpillm.models.spec import Part
from mpillm.models.stacks.decoder_stack import Cache, Decoder
from mpillm.tasks.cross_entropy import cross_entropy_sum

SMALL = {"layers": 2, "width": 32, "heads": 4, "context": 16, "vocab_size": 50}
KINDS = [
    dict(zip(("norm", "positions", "activation", "kv_heads", "tied", "bias"), kind, strict=True))
    for kind in itertools.product(
        ("rmsnorm", "layernorm"),
        ("rotary", "learned"),
        ("swiglu", "gelu"),
        (0, 2),
        (True, False),
        (False, True),
    )
]


def make(**changes: object) -> Decoder:
    return create(DecoderConfig(**{**SMALL, **changes}), seed=1).eval()  # type: ignore[arg-type]


def ids(rows: int = 2, length: int = 16) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS[::5])
def test_a_cache_changes_nothing(kind: dict[str, object]) -> None:
    model, tokens = make(**kind), ids()
    whole = model(tokens)
    cache = Cache(model.config, 2, torch.device("cpu"))
    pieces = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 5), (5, 9), (9, 10), (10, 16))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS[::7])
def test_no_position_sees_the_future(kind: dict[str, object]) -> None:
    model, tokens = make(**kind), ids()
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50
    torch.testing.assert_close(model(tokens)[:, :9], model(changed)[:, :9])
    assert not torch.allclose(model(tokens)[:, 9:], model(changed)[:, 9:])


def test_the_document_mask_cuts_documents_apart() -> None:
    model, tokens = make(), ids(1)
    documents = torch.tensor([[0] * 6 + [1] * 10])
    masked = model(tokens, documents)
    torch.testing.assert_close(masked[:, :6], model(tokens[:, :6]))
    # Rotary positions are relative, so the second document is as if it stood alone.
    torch.testing.assert_close(masked[:, 6:], model(tokens[:, 6:]), rtol=1e-4, atol=1e-5)


def test_grouped_queries_equal_repeated_keys_and_values() -> None:
    grouped = make(kv_heads=2)
    full = make(kv_heads=0)
    state = grouped.state_dict()
    for name, weight in state.items():
        if ".key." in name or ".value." in name:
            state[name] = weight.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(ids()), full(ids()), rtol=1e-4, atol=1e-5)


def test_the_first_loss_is_that_of_a_guess() -> None:
    tokens = ids()
    loss = cross_entropy_sum(make()(tokens[:, :-1]), tokens[:, 1:]) / tokens[:, 1:].numel()
    assert float(loss.detach()) == pytest.approx(math.log(50), rel=0.02)


def test_weights_follow_from_the_seed_and_the_name_alone() -> None:
    one, same, other = make(), make(), create(DecoderConfig(**SMALL), seed=2)  # type: ignore[arg-type]
    deeper = make(layers=4)
    for (name, weight), again in zip(one.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(weight, again), name
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert torch.equal(
        one.layers["1"].attention.query.weight, deeper.layers["1"].attention.query.weight
    )
    assert float(deeper.layers["0"].attention.output.weight.detach().std()) == pytest.approx(
        0.02 / 8**0.5, rel=0.1
    )


def test_a_tied_head_is_the_embedding() -> None:
    model = make(tied=True)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_passing_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="17 positions exceed the context of 16"):
        make()(ids(1, 17))


@pytest.mark.parametrize("kind", KINDS[::6])
def test_parts_in_a_row_are_the_whole(kind: dict[str, object]) -> None:
    whole = make(layers=3, **kind)
    config, documents = whole.config, torch.tensor([[0] * 6 + [1] * 10] * 2)
    parts = [create(config, 1, part=Part(*part)).eval() for part in ((0, 1), (1, 2), (2, 3))]
    x = ids()
    for part in parts:
        x = part(x, documents)
    assert torch.equal(x, whole(ids(), documents))
    weights = {name: weight for part in parts for name, weight in part.named_weights()}
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        name: tuple(weight.shape) for name, weight in whole.named_weights()
    }
    for name, weight in whole.named_weights():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_positions_of_a_row_have_their_own_places(positions: str) -> None:
    """Rows in another order, with an attention that undoes it: the same outputs, reordered."""
    model, tokens = make(positions=positions), ids()
    places = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    back = places.argsort()

    def in_order(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
        return attend(*(x[:, back] for x in (q, k, v)))[:, places]

    whole = model(tokens)
    for _, block in model.numbered_blocks():
        block.attention.kernel = in_order  # type: ignore[union-attr]
    fields = {"ids": tokens[:, places], "positions": places}
    found = plain_outputs(model.forward_part(fields, ()).outputs)[0]
    torch.testing.assert_close(found, whole[:, places], rtol=1e-4, atol=1e-5)
