"""The encoder-decoder: parts, recompute, padding, caches, counts and settings."""

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from mpillm.errors import RecipeError, UsageError
from mpillm.models.decoder import DecoderConfig
from mpillm.models.encoder_decoder import SHAPES, EncoderDecoderConfig
from mpillm.models.encoder_decoder_weights import encoder_decoder_weights
from mpillm.models.layers.relative_bias import RelativeBias
from mpillm.models.linear_head import plain_outputs
from mpillm.models.model_catalog import named_shapes
from mpillm.models.part_module import PartModule, create, weight_shapes
from mpillm.models.spec import Part
from mpillm.parallel.pipeline.split_backward import SplitBackward
from mpillm.tasks.cross_entropy import cross_entropy_sum

LAYERS, DECODER, SOURCE, LENGTH, MELS = 2, 3, 11, 7, 6
SMALL: dict[str, Any] = {
    "layers": LAYERS,
    "decoder_layers": DECODER,
    "width": 32,
    "heads": 4,
    "head_width": 0,
    "hidden": 48,
    "context": LENGTH,
    "source_context": SOURCE,
    "vocab_size": 50,
}
KINDS: dict[str, EncoderDecoderConfig] = {
    "t5": SHAPES["t5-small"].replace(**SMALL, relative_buckets=8, relative_distance=6),
    "t5 1.1": SHAPES["t5-v1.1-base"].replace(**SMALL, kv_heads=2),
    "marian": SHAPES["marian-base"].replace(**SMALL),
    "whisper": SHAPES["whisper-tiny"].replace(**SMALL, mels=MELS),
    "mixture": EncoderDecoderConfig(**SMALL, experts=3, query_key_norm=True),
}
BLOCKS = LAYERS + DECODER
# Within the encoder, between both stacks, within the decoder, and all of them.
CUTS = [(0, 1, 5), (0, 2, 5), (0, 4, 5), (0, 1, 3, 5), (0, 1, 2, 3, 4, 5)]
each_kind = pytest.mark.parametrize("kind", KINDS)


def fields(rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "source": torch.randint(50, (rows, SOURCE), generator=generator),
        "frames": torch.randn(rows, 2 * SOURCE, MELS, generator=generator),
        "source_lengths": torch.tensor([SOURCE, 4, 1])[:rows],
        "ids": torch.randint(50, (rows, LENGTH), generator=generator),
        "targets": torch.randint(50, (rows, LENGTH), generator=generator),
        "dropout_keys": torch.arange(rows),
    }


def gradients(parts: list[PartModule], split: bool = False) -> dict[str, Tensor]:
    """Run the parts in a row, forward and backward; return the loss and the gradients by name."""
    given, streams = fields(), ()
    runs = []
    for part in parts:
        received = tuple(stream.detach().requires_grad_() for stream in streams)
        found = part.forward_part(given, received)
        runs.append((found, received))
        streams = found.outputs  # type: ignore[assignment]
    loss = cross_entropy_sum(streams[0], given["targets"]) / 21
    roots: tuple[Any, ...] = (loss,)
    incoming: tuple[Any, ...] = (torch.ones_like(loss),)
    for found, received in reversed(runs):
        roots = roots or found.outputs
        if split:
            halves = SplitBackward(roots, found.pivots)
            incoming = halves.input(incoming)[: len(received)]
            halves.weights()
        else:
            torch.autograd.backward(roots, incoming)
            incoming = tuple(stream.grad for stream in received)
        roots = ()
    gathered: dict[str, Tensor] = {"loss": loss.detach()}
    for part in parts:
        for name, weight in part.named_weights():
            assert weight.grad is not None, name
            gathered[name] = gathered.get(name, 0) + weight.grad
    return gathered


def apart(part: PartModule) -> PartModule:
    """Give each use of a tied weight a leaf of its own, as a pipeline does."""
    for name, weight in list(part.named_parameters(remove_duplicate=False)):
        if name in part.spec.tied_weights:
            part.set_weight(name, torch.nn.Parameter(weight.data))
    return part


@each_kind
def test_names_shapes_and_counts_are_the_modules(kind: str) -> None:
    spec = KINDS[kind]
    assert encoder_decoder_weights(spec) == {
        name: shape for name, (_, shape) in weight_shapes(spec).items()
    }
    for first in range(BLOCKS):
        for last in range(first + 1, BLOCKS + 1):
            part = create(spec, 1, part=Part(first, last))
            counted = sum(weight.numel() for weight in part.parameters())
            assert spec.parameters_of(Part(first, last)) == counted, (first, last)
            blocks = [
                sum(w.numel() for n, w in block.named_parameters() if "relative" not in n)
                for _, block in part.numbered_blocks()
            ]
            expected = counted - sum(blocks), max(blocks)
            assert spec.block_parameters_of(Part(first, last)) == expected, (first, last)


@each_kind
def test_parts_in_a_row_are_the_whole(kind: str) -> None:
    spec = KINDS[kind].replace(dropout=0.2, attention_dropout=0.2, embedding_dropout=0.1)
    whole = gradients([apart(create(spec, 1))])
    tied = set(spec.tied_weights.values())
    for cuts, split in product(CUTS, (False, True)):
        parts = [apart(create(spec, 1, part=Part(*cut))) for cut in pairwise(cuts)]
        found = gradients(parts, split)
        assert set(found) == set(whole)
        for name, gradient in whole.items():
            if name in tied:  # summed in another order
                torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(found[name], gradient), (name, cuts, split)


@each_kind
def test_the_streams_of_a_cut_have_the_shapes_that_the_spec_says(kind: str) -> None:
    spec = KINDS[kind]
    for cut in range(1, BLOCKS):
        made = create(spec, 1, part=Part(0, cut)).forward_part(fields(), ()).outputs
        shapes = tuple(tuple(stream.shape[1:]) for stream in plain_outputs(made))
        assert shapes == spec.streams_ahead(cut) == spec.streams_ahead(cut, LENGTH)
    assert spec.streams_ahead(BLOCKS - 1, 5) == ((SOURCE, 32), (5, 32))
    assert spec.stream_features == (SOURCE + LENGTH) * 32


@pytest.mark.parametrize("recompute", ["attention", "full", 2])
@each_kind
def test_recomputed_gradients_have_the_same_bits(kind: str, recompute: Any) -> None:
    spec = KINDS[kind].replace(dropout=0.2)
    kept, again = create(spec, 1), create(spec, 1)
    again.set_recompute(recompute)
    wanted, found = gradients([kept]), gradients([again])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@each_kind
def test_padding_is_attended_by_none(kind: str) -> None:
    model, given = create(KINDS[kind], 1), fields()
    given.pop("dropout_keys")
    with torch.no_grad():
        padded = model(given)
        empty = model({**given, "source_lengths": torch.tensor([SOURCE, 4, 0])})
        assert torch.equal(empty, padded)
        if kind == "whisper":
            # Frames next to the end reach the last position through the convolutions.
            other = given["frames"].clone()
            other[1, 9:], other[2, 3:] = 7.0, -7.0
            torch.testing.assert_close(model({**given, "frames": other}), padded)
            return
        for row, length in enumerate(given["source_lengths"].tolist()):
            alone = {"source": given["source"][row : row + 1, :length], "ids": given["ids"][[row]]}
            torch.testing.assert_close(model(alone)[0], padded[row], rtol=1e-4, atol=1e-5)


@each_kind
def test_the_decoder_is_causal_and_reads_all_of_the_source(kind: str) -> None:
    model, given = create(KINDS[kind], 1), fields()
    given = {**given, "source_lengths": torch.full((3,), SOURCE)}
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
        wanted = model(given)
        ids, source, frames = (given[name].clone() for name in ("ids", "source", "frames"))
        ids[:, 4] = (ids[:, 4] + 1) % 50
        changed = (model({**given, "ids": ids}) != wanted).any(-1).any(0)
        assert changed.tolist() == [False] * 4 + [True] * (LENGTH - 4)
        source[:, -1], frames[:, -1] = (source[:, -1] + 1) % 50, 3.0
        other = model({**given, "source": source, "frames": frames})
        assert (other != wanted).any(-1).all()


@each_kind
def test_a_cache_changes_nothing(kind: str) -> None:
    model, given = create(KINDS[kind], 1), fields()
    given.pop("dropout_keys")
    with torch.no_grad():
        whole, cache = model(given), model.encode_source(given)
        pieces = [
            model.next_logits(given["ids"][:, first:last], cache)
            for first, last in pairwise((0, 2, 3, 4, 6, LENGTH))
        ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    assert cache.length == LENGTH


def test_each_switch_changes_the_outputs() -> None:
    """A switch that nothing reads would pass every other test."""
    for kind, changes in (
        ("t5", {"relative_distance": 5, "scaled_head": False, "query_scale_width": 0.0}),
        ("marian", {"sinusoid_ends": True, "scaled_embedding": False, "activation": "relu"}),
        ("whisper", {"sinusoid_ends": False, "activation": "silu"}),
    ):
        spec, given = KINDS[kind], fields()
        model = create(spec, 1)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(4)
            wanted = model(given)
            for name, value in changes.items():
                other = create(spec.replace(**{name: value}), 1)
                other.load_state_dict(model.state_dict())
                assert not torch.allclose(other(given), wanted), name


def test_the_named_shapes_have_the_sizes_of_their_models() -> None:
    # Of the published models, but for the constant tables of Whisper's encoder.
    sizes = {
        "t5-small": 60_506_624,
        "t5-v1.1-base": 247_577_856,
        "whisper-tiny": 37_760_640 - 1500 * 384,
        "whisper-base": 72_593_920 - 1500 * 512,
    }
    assert sizes == {name: SHAPES[name].parameters for name in sizes}
    assert set(SHAPES) == set(named_shapes("encoder-decoder")) <= set(named_shapes())
    for shape in SHAPES.values():
        spec = shape.replace(vocab_size=shape.vocab_size or 99)
        with torch.device("meta"):
            model = spec.build()
        assert sum(weight.numel() for weight in model.parameters()) == spec.parameters


def test_flops_follow_the_formula() -> None:
    spec = KINDS["marian"].replace(source_context=14, context=7)
    attention, forward = 4 * 32 * 32, 2 * 32 * 48
    encoder = 6 * (attention + forward) + 12 * 32 * 14
    cross = 6 * (2 * 32 * 32 + 2 * 2 * 32 * 32) + 12 * 32 * 14
    decoder = 6 * (attention + forward) + 12 * 32 * 7 + cross
    # A token of the decoder has two of the source.
    assert spec.block_flops == (2 * encoder,) * 2 + (decoder,) * 3
    assert spec.end_flops == (0, 6 * 50 * 32)
    assert spec.flops_per_token == sum(spec.block_flops) + 6 * 50 * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 4}, "window = 4: an encoder-decoder attends to all positions"),
        ({"start_token": 9, "vocab_size": 9}, "start_token = 9 is not in a vocabulary of 9; name"),
        ({"mels": 80}, "mels = 80: a source of sound has sinusoidal positions"),
        (
            {"positions": "sinusoidal", "width": 33, "heads": 3},
            "an even width of 2 or more, and width is 33; set width to 34",
        ),
        (
            {"positions": "sinusoidal", "sinusoid_ends": True, "width": 2, "heads": 1},
            "an even width of 4 or more, and width is 2; set width to 4",
        ),
        ({"relative_buckets": 3}, "relative_buckets = 3 with relative_distance = 128: classes"),
        ({"relative_distance": 16}, "relative_buckets = 32 with relative_distance = 16: classes"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        EncoderDecoderConfig(**changes)


def test_what_each_architecture_does_not_generate() -> None:
    with pytest.raises(UsageError, match="'encoder-decoder' does not continue text"):
        create(KINDS["t5"], 1).make_cache(1)
    decoder = create(DecoderConfig(layers=1, width=16, heads=2, context=4, vocab_size=9), 1)
    with pytest.raises(UsageError, match="'decoder' reads no source; generate with an enc"):
        decoder.encode_source(fields())


@pytest.mark.parametrize("causal", [False, True])
def test_the_fewest_classes_of_distances_are_finite(causal: bool) -> None:
    config = EncoderDecoderConfig(relative_buckets=4, relative_distance=3)
    bias = RelativeBias(config, causal)
    buckets = bias.bucket_of(torch.arange(-20, 21))
    assert buckets.min() == 0
    assert buckets.max() == 3


@each_kind
def test_bfloat16_weights_with_float32_tables(kind: str) -> None:
    """Training lowers weights alone: tables of positions keep float32."""
    model = create(KINDS[kind].replace(dropout=0.0), seed=1)
    given = fields()
    [expected] = plain_outputs(model.forward_part(given, ()).outputs)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    [found] = plain_outputs(model.forward_part(given, ()).outputs)
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
