"""The loss that balances the experts of a mixture, against its formula written out."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mpillm.errors import RecipeError
from mpillm.models.decoder import DecoderConfig
from mpillm.models.encoder import EncoderConfig
from mpillm.models.encoder_decoder import EncoderDecoderConfig
from mpillm.models.families.family_catalog import family_of
from mpillm.models.layers.mixture import Mixture, balance
from mpillm.models.linear_head import plain_outputs
from mpillm.models.part_module import PartModule, create
from mpillm.models.spec import ModelSpec
from mpillm.parallel.pipeline.split_backward import SplitBackward

SIZES: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "hidden": 16, "vocab_size": 40}
SIZES |= {"context": 12, "experts": 5}
ROWS, LENGTH, FACTOR = 3, 12, 0.5
SPECS: dict[str, Any] = {
    "decoder": DecoderConfig(**SIZES, balance_loss=FACTOR),
    "all": DecoderConfig(**SIZES, balance_loss=FACTOR, expert_softmax="all", experts_per_token=1),
    "encoder": EncoderConfig(**SIZES, bias=False, balance_loss=FACTOR),
    "encoder-decoder": EncoderDecoderConfig(**SIZES, balance_loss=FACTOR),
}


def fields() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(40, (ROWS, LENGTH), generator=generator)
    return {"ids": ids, "source": ids.flip(1)}


def written_out(logits: Tensor, chosen: int) -> Tensor:
    """Add Σ f_i P_i over the sequences, expert by expert, from a router's logits (N, E)."""
    total = torch.zeros(())
    for own in logits.view(ROWS, LENGTH, -1):
        shares, experts = own.softmax(-1), own.shape[-1]
        choices = shares.topk(chosen).indices
        for expert in range(experts):
            f = experts * float((choices == expert).sum()) / (LENGTH * chosen)
            total = total + f * shares[:, expert].mean()
    return total


def watched(model: PartModule) -> list[Tensor]:
    """Collect the logits of all routers."""
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Mixture):
            module.router.register_forward_hook(lambda *given: found.append(given[2]))
    return found


def gradients(model: PartModule, root: Tensor) -> dict[str, Tensor]:
    weights = dict(model.named_weights())
    made = torch.autograd.grad(root, list(weights.values()), allow_unused=True)
    return {name: g for name, g in zip(weights, made, strict=True) if g is not None}


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
@pytest.mark.parametrize("kind", SPECS)
def test_gradients_are_those_of_the_formula(kind: str, recompute: Any) -> None:
    spec = SPECS[kind]
    plain, model = create(spec, 1), create(spec, 1)
    logits = watched(plain)
    plain.forward_part(fields(), ())
    layers = 4 if kind == "encoder-decoder" else 2
    assert len(logits) == layers
    expected = FACTOR * sum(written_out(own, spec.experts_per_token) for own in logits)
    assert isinstance(expected, Tensor)
    model.set_recompute(recompute)
    found = model.forward_part(fields(), ()).balance
    assert found is not None
    torch.testing.assert_close(found, expected)
    wanted, own = gradients(plain, expected), gradients(model, found)
    assert wanted.keys() == own.keys()
    assert any("router" in name for name in own)
    for name, gradient in wanted.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_it_is_1_where_all_experts_are_alike_and_more_elsewhere() -> None:
    experts = torch.arange(8)[None].expand(2, -1).reshape(16, 1) % 4
    even = torch.full((2, 8, 4), 0.25)
    assert float(balance(even, experts)) == 2
    # All positions choose expert 0, and almost surely.
    sure = torch.tensor([0.97, 0.01, 0.01, 0.01]).expand(2, 8, 4)
    assert float(balance(sure, torch.zeros(16, 1, dtype=torch.int64))) == pytest.approx(2 * 3.88)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_two_halves_of_a_backward_pass_have_the_bits_of_one(recompute: Any) -> None:
    found = []
    for halves in (False, True):
        model = create(SPECS["decoder"].replace(tied=False), 1)
        model.set_recompute(recompute)
        outputs, pivots, added = model.forward_part(fields(), ())
        assert added is not None
        roots = plain_outputs(outputs)[0].square().sum(), added
        if halves:
            split = SplitBackward(roots, pivots)
            split.input((None, None))
            split.weights()
        else:
            torch.autograd.backward(roots)
        found.append({name: weight.grad for name, weight in model.named_weights()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize("kind", SPECS)
def test_an_evaluation_computes_none(kind: str) -> None:
    model = create(SPECS[kind], 1)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert model.forward_part(fields(), ()).balance is None
    without = create(SPECS[kind].replace(balance_loss=0.0), 1)
    assert without.forward_part(fields(), ()).balance is None


def test_it_is_a_setting_of_mixtures_and_of_training_alone() -> None:
    with pytest.raises(RecipeError, match=r"balance_loss = 0\.1 spreads .* and there are none"):
        DecoderConfig(balance_loss=0.1)
    # A published mixture has no place for it, and is the same model.
    spec: ModelSpec = DecoderConfig(**SIZES, tied=False, balance_loss=0.1)
    assert family_of(spec).model_types == ("mixtral",)


def largest_share(factor: float, seed: int) -> float:
    """Train a mixture from random numbers; return the largest share of one expert.

    It is the share of the choices of a layer, as the mean over layers.
    """
    spec = DecoderConfig(
        **{**SIZES, "width": 32, "heads": 4, "hidden": 32, "vocab_size": 64, "context": 16},
        experts_per_token=1,
        expert_softmax="all",
        balance_loss=factor,
    ).replace(experts=4)
    model, generator = create(spec, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.001)
    # As the tokens of a text: few are frequent.
    chances = (1.0 + torch.arange(64)) ** -1.5
    for _ in range(100):
        ids = torch.multinomial(chances, 16 * 17, replacement=True, generator=generator)
        ids = ids.view(16, 17)
        made = model.forward_part({"ids": ids[:, :-1]}, ())
        logits = plain_outputs(made.outputs)[0].flatten(0, 1)
        loss = F.cross_entropy(logits, ids[:, 1:].flatten())
        optimizer.zero_grad()
        (loss if made.balance is None else loss + made.balance / 16).backward()
        optimizer.step()
    found = watched(model)
    with torch.no_grad():
        model.forward_part({"ids": ids[:, :-1]}, ())
    shares = [torch.bincount(own.argmax(-1), minlength=4) / len(own) for own in found]
    return float(torch.stack(shares).amax(dim=1).mean())


def test_training_with_it_spreads_the_choices() -> None:
    # One run's share moves by 0.2 with the seed and the processor: the mean of three.
    without, balanced = (
        sum(largest_share(factor, seed) for seed in (1, 2, 3)) / 3 for factor in (0.0, 0.1)
    )
    assert balanced < without - 0.2
