"""The switches of the one block: parts, recompute, documents, caches, counts and initial values."""

import hashlib
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mpillm.errors import RecipeError
from mpillm.models.decoder import DecoderConfig
from mpillm.models.decoder_weights import decoder_weights
from mpillm.models.layers.rotary import Rotary
from mpillm.models.linear_head import plain_outputs
from mpillm.models.part_module import PartModule, create, weight_shapes
from mpillm.models.spec import Part
from mpillm.parallel.pipeline.split_backward import SplitBackward
from mpillm.tasks.cross_entropy import cross_entropy_sum

SMALL = {"layers": 4, "width": 32, "heads": 4, "context": 16, "vocab_size": 50}
GEMMA = {"norm": "rmsnorm1p", "activation": "geglu", "scaled_embedding": True, "head_width": 16}
KINDS: dict[str, dict[str, Any]] = {
    "llama 3": {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_theta": 100.0},
    "mistral": {"window": 5, "kv_heads": 2},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"query_key_norm": True, "head_width": 12},
    "gemma": GEMMA,
    "gemma 2": {
        **GEMMA,
        "norm_place": "sandwich",
        "window": 4,
        "full_every": 2,
        "attention_soft_cap": 2.0,
        "logits_soft_cap": 3.0,
        "query_scale_width": 24.0,
    },
    "gemma 3": {
        **GEMMA,
        "norm_place": "sandwich",
        "query_key_norm": True,
        "window": 6,
        "full_every": 3,
        "window_rope_theta": 100.0,
    },
    "mixture": {"experts": 5, "hidden": 24, "expert_softmax": "all", "experts_per_token": 3},
    "qwen2 mixture": {"experts": 4, "hidden": 16, "shared_hidden": 24, "shared_gate": True},
    "exact and yarn": {"activation": "geglu-exact", "rope_scaling": "yarn", "rope_factor": 2.0},
}
GPT2 = {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True}
RELEASED: dict[str, tuple[Any, ...]] = {
    "llama": ("2c99b6f71cbb", 625.98674, 106.613297),
    "gpt2": ("843010a690f8", 505.013366, 112.573654),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def settings(kind: str, **changes: Any) -> DecoderConfig:
    return DecoderConfig(**{**SMALL, **KINDS[kind], **changes})


def tokens() -> Tensor:
    return torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))


def fields() -> dict[str, Tensor]:
    documents = torch.tensor([[0] * 6 + [1] * 10, [0] * 16])
    return {"ids": tokens(), "documents": documents, "dropout_keys": torch.arange(2)}


def gradients(parts: list[PartModule], split: bool = False) -> dict[str, Tensor]:
    """Run the parts in a row, forward and backward; return the gradients by name."""
    streams: tuple[Tensor, ...] = ()
    runs = []
    for part in parts:
        given = tuple(stream.detach().requires_grad_() for stream in streams)
        found = part.forward_part(fields(), given)
        runs.append((found, given))
        streams = found.outputs  # type: ignore[assignment]
    loss = cross_entropy_sum(streams[0], tokens()) / 32
    roots, incoming = (loss,), (torch.ones_like(loss),)
    for found, given in reversed(runs):
        roots = roots or found.outputs  # type: ignore[assignment]
        if split:
            halves = SplitBackward(roots, found.pivots)
            incoming = halves.input(incoming)  # type: ignore[assignment]
            halves.weights()
        else:
            torch.autograd.backward(roots, incoming)
            incoming = tuple(stream.grad for stream in given)  # type: ignore[assignment]
        roots = ()  # type: ignore[assignment]
    gathered: dict[str, Tensor] = {}
    for part in parts:
        for name, weight in part.named_weights():
            assert weight.grad is not None, name
            gathered[name] = gathered.get(name, 0) + weight.grad
    return gathered


@each_kind
def test_names_shapes_and_counts_are_the_modules(kind: str) -> None:
    spec = settings(kind)
    model = create(spec, 1)
    assert spec.parameters == sum(weight.numel() for weight in model.parameters())
    assert decoder_weights(spec) == {
        name: shape for name, (_, shape) in weight_shapes(spec).items()
    }
    for first, last in ((0, 1), (1, 3), (3, 4)):
        part = create(spec, 1, part=Part(first, last))
        counted = sum(weight.numel() for weight in part.parameters())
        assert spec.parameters_of(Part(first, last)) == counted


@each_kind
def test_parts_in_a_row_are_the_whole(kind: str) -> None:
    spec = settings(kind, attention_dropout=0.2, dropout=0.2, tied=False)
    cuts = ((0, 1), (1, 3), (3, 4))
    parts = [create(spec, 1, part=Part(*cut)) for cut in cuts]
    whole = gradients([create(spec, 1)])
    for split in (False, True):
        found = gradients([create(spec, 1, part=Part(*cut)) for cut in cuts], split)
        assert set(found) == set(whole)
        for name, gradient in whole.items():
            assert torch.equal(found[name], gradient), name
    streams: Any = ()
    for part in parts:
        streams = part.forward_part(fields(), streams).outputs
    wanted = create(spec, 1).forward_part(fields(), ()).outputs
    assert torch.equal(plain_outputs(streams)[0], plain_outputs(wanted)[0])


@pytest.mark.parametrize("recompute", ["attention", "full", 2])
@each_kind
def test_recomputed_gradients_have_the_same_bits(kind: str, recompute: Any) -> None:
    spec = settings(kind, dropout=0.2)
    kept, again = create(spec, 1), create(spec, 1)
    again.set_recompute(recompute)
    wanted, found = gradients([kept]), gradients([again])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@each_kind
def test_a_document_is_as_if_it_were_alone(kind: str) -> None:
    model = create(settings(kind), 1)
    with torch.no_grad():
        row = model(tokens()[:1], fields()["documents"][:1])
        for first, last in ((0, 6), (6, 16)):
            alone = model(tokens()[:1, first:last])
            torch.testing.assert_close(row[:, first:last], alone, rtol=1e-4, atol=1e-5)


@each_kind
def test_a_cache_changes_nothing_beyond_the_window(kind: str) -> None:
    model = create(settings(kind), 1)
    with torch.no_grad():
        whole, cache = model(tokens()), model.make_cache(2)
        cuts = (0, 3, 4, 5, 9, *range(10, 17))
        pieces = [
            model.next_logits(tokens()[:, first:last], cache) for first, last in pairwise(cuts)
        ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


@each_kind
def test_each_switch_changes_the_outputs(kind: str) -> None:
    """A switch that nothing reads would pass every other test."""
    spec = settings(kind)
    model = create(spec, 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
        wanted = model(tokens())
    plain = DecoderConfig()
    of_shape = {"layers", "width", "heads", "kv_heads", "head_width", "context", "vocab_size"}
    of_shape |= {"experts", "hidden", "shared_hidden", "shared_gate"}
    others = {"norm", "norm_place", "query_key_norm", "qkv_bias", "rope_factor", "window"}
    state = model.state_dict()
    for name in {*KINDS[kind]} - of_shape - others:
        changes = {name: getattr(plain, name)}
        if name == "rope_scaling":
            changes["rope_factor"] = 1.0
        other = create(spec.replace(**changes), 1)
        other.load_state_dict(state)
        with torch.no_grad():
            assert not torch.allclose(other(tokens()), wanted), name


def test_windows_bound_what_a_position_reads() -> None:
    """With two layers of 3 positions, a position reads 4 back and none further."""
    spec = DecoderConfig(**{**SMALL, "layers": 2}, window=3)
    model, changed = create(spec, 1), tokens()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    with torch.no_grad():
        differs = (model(tokens()) != model(changed)).any(-1).any(0)
    assert differs.nonzero().flatten().tolist() == [5, 6, 7, 8, 9]


def test_which_layers_have_a_window() -> None:
    spec = DecoderConfig(layers=7, window=4, full_every=3)
    assert [spec.slides(block) for block in range(7)] == [
        True,
        True,
        False,
        True,
        True,
        False,
        True,
    ]
    assert not any(DecoderConfig(layers=3).slides(block) for block in range(3))
    full, windowed = spec.block_flops[2], spec.block_flops[0]
    attention = 12 * spec.width * spec.context
    assert full - windowed == pytest.approx(attention * (1 - 4 / 256) ** 2)
    assert DecoderConfig(window=256).block_flops == DecoderConfig().block_flops


def test_angles_are_scaled_as_the_papers_say() -> None:
    plain = DecoderConfig(**SMALL, rope_theta=100.0)
    frequencies = [100.0 ** (-n / 4) for n in range(4)]

    def turns(config: DecoderConfig) -> list[float]:
        return Rotary(config).sin_TD[1, :4].double().asin().tolist()

    assert turns(plain.replace(rope_theta=1e4)) != pytest.approx(turns(plain))
    slowed = plain.replace(rope_scaling="linear", rope_factor=2.0)
    assert turns(slowed)[1:] == pytest.approx([each / 2 for each in frequencies[1:]], rel=1e-5)
    llama = plain.replace(
        rope_scaling="llama3", rope_factor=8.0, rope_original_context=64, rope_high=6.0
    )
    # Turns in 64 positions: 10.2, 3.2, 1.02, 0.3. More than 6 stay, less than 1 are scaled.
    found = turns(llama)
    assert found[0] == pytest.approx(turns(plain)[0])
    assert frequencies[1] / 8 < found[1] < frequencies[1]
    assert found[3] == pytest.approx(frequencies[3] / 8, rel=1e-5)


def test_scales_begin_at_one() -> None:
    model = create(settings("gemma 3"), 1)
    norms = {name: weight for name, weight in model.named_parameters() if weight.dim() == 1}
    assert len(norms) == 4 * 6 + 1
    assert not any(weight.any() for weight in norms.values())
    assert (create(settings("qwen3"), 1).layers["0"].attention.query_norm.weight == 1).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_defaults_are_the_model_of_earlier_releases(kind: str) -> None:
    """Names and initial values, by which checkpoints and seeds of earlier releases stay valid."""
    changes = GPT2 if kind == "gpt2" else {}
    model = create(DecoderConfig(**{**SMALL, "layers": 2}, **changes), 1)
    names = hashlib.sha256(" ".join(name for name, _ in model.named_parameters()).encode())
    size = sum(float(weight.detach().double().abs().sum()) for weight in model.parameters())
    loss = float(cross_entropy_sum(model(tokens()), tokens()).detach())
    # Computed by the release without these switches. Processors differ in the last bits of a normal
    # distribution.
    assert names.hexdigest()[:12] == RELEASED[kind][0]
    assert (size, loss) == pytest.approx(RELEASED[kind][1:], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_every": 2}, "full_every = 2 names the layers without a window"),
        ({"rope_factor": 2.0}, "rope_factor = 2 scales nothing without rope_scaling"),
        ({"rope_scaling": "llama3", "rope_low": 4.0}, "rope_low = 4 turns are not less than"),
        ({"experts": 2, "experts_per_token": 3}, "experts_per_token = 3 is more than experts = 2"),
        ({"experts": 2, "bias": True}, "experts have no biases"),
        ({"experts": 2, "shared_gate": True}, "shared_gate scales a shared expert"),
        ({"shared_hidden": 8}, "a shared expert needs others"),
        ({"head_width": 7}, "an even width a head, and head_width is 7"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        DecoderConfig(**changes)


def test_a_width_of_heads_needs_no_divisor() -> None:
    spec = DecoderConfig(width=30, heads=4, head_width=8, layers=1, vocab_size=20)
    assert create(spec, 1)(tokens()[:, :4] % 20).shape == (2, 4, 20)
