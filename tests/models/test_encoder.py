"""Encoders: their parts, padding, documents and heads."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mpillm.errors import DataError, RecipeError
from mpillm.models.encoder import SHAPES, EncoderConfig
from mpillm.models.encoder_weights import encoder_weights
from mpillm.models.linear_head import plain_outputs
from mpillm.models.part_module import create, weight_shapes
from mpillm.models.spec import Part

SMALL = EncoderConfig(layers=3, width=32, heads=4, context=24, vocab_size=50, token_types=2)
MODERN = SHAPES["modernbert-tiny"].replace(
    layers=3, width=32, heads=4, hidden=48, context=24, vocab_size=50, window=8
)
IMAGES = SHAPES["vit-tiny-digits"].replace(layers=3, width=32, classes=10)
SOUND = SHAPES["sound-tiny"].replace(layers=3, width=32, context=24, mels=8, vocab_size=20, heads=4)
CLASSES = SMALL.replace(head="sequence", head_layer="tanh", classes=5)
KINDS: dict[str, EncoderConfig] = {
    "bert": SMALL,
    "roberta": SMALL.replace(position_offset=2, token_types=1, tied=False),
    "classes": CLASSES,
    "mean": CLASSES.replace(pooling="mean"),
    "token": SMALL.replace(head="token", head_layer="none", classes=4),
    "span": SMALL.replace(head="span", head_layer="none"),
    "hidden states": SMALL.replace(head="none", head_layer="none"),
    "hidden states and pooler": SMALL.replace(head="none", head_layer="tanh"),
    "modernbert": MODERN,
    "modernbert, classes": MODERN.replace(head="sequence", pooling="mean", classes=3),
    "images": IMAGES,
    "images, pooler": IMAGES.replace(head="none", head_layer="tanh"),
    "sound": SOUND,
    "grouped": MODERN.replace(kv_heads=2, norm="rmsnorm", activation="swiglu"),
}
LENGTHS = torch.tensor([24, 9, 17])


def fields_of(config: EncoderConfig, rows: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    if config.image_size:
        size = rows, config.channels, config.image_size, config.image_size
        return {"pixels": torch.randn(size, generator=generator)}
    if config.mels:
        frames = torch.randn(rows, 2 * config.context, config.mels, generator=generator)
        return {"frames": frames, "lengths": LENGTHS[:rows]}
    ids = torch.randint(config.vocab_size, (rows, config.context), generator=generator)
    found = {"ids": ids, "lengths": LENGTHS[:rows]}
    if config.token_types:
        found["token_types"] = (ids > 25).long() % config.token_types
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_the_modules(kind: str) -> None:
    spec = KINDS[kind]
    wanted = {name: shape for name, (_, shape) in weight_shapes(spec).items()}
    assert encoder_weights(spec) == wanted
    for part in (spec.whole, Part(0, 1), Part(1, 2), Part(2, 3)):
        module = spec.build(part)
        counted = sum(weight.numel() for weight in module.parameters())
        assert counted == spec.parameters_of(part)
        blocks = [
            sum(weight.numel() for weight in block.parameters())
            for _, block in module.numbered_blocks()
        ]
        assert spec.block_parameters_of(part) == (counted - sum(blocks), max(blocks))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_the_whole(kind: str) -> None:
    spec, fields = KINDS[kind], fields_of(KINDS[kind])
    whole = create(spec, 1)
    wanted = plain_outputs(whole.forward_part(fields, ()).outputs)
    streams: Any = ()
    for block in range(3):
        part = create(spec, 1, part=Part(block, block + 1))
        given = {name: field for name, field in fields.items() if name in spec.shared_inputs}
        made = part.forward_part(fields if part.begins else given, streams)
        streams = plain_outputs(made.outputs)
        if not part.ends:
            assert tuple(x.shape[1:] for x in streams) == spec.streams_ahead(block + 1)
    assert len(streams) == len(wanted)
    assert all(torch.equal(one, other) for one, other in zip(streams, wanted, strict=True))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("bert", (3, 24, 50)),
        ("classes", (3, 5)),
        ("token", (3, 24, 4)),
        ("span", (3, 2, 24)),
        ("hidden states", (3, 24, 32)),
        ("images", (3, 10)),
        ("sound", (3, 24, 20)),
    ],
)
def test_a_head_gives_its_shape(kind: str, shape: tuple[int, ...]) -> None:
    spec = KINDS[kind]
    outputs = create(spec, 1).forward_part(fields_of(spec), ()).outputs
    assert plain_outputs(outputs)[0].shape == shape


@pytest.mark.parametrize("kind", ["bert", "mean", "modernbert", "modernbert, classes", "token"])
def test_padding_changes_no_real_position(kind: str) -> None:
    spec = KINDS[kind]
    model, fields = create(spec, 1), fields_of(spec)
    padded = plain_outputs(model.forward_part(fields, ()).outputs)[0]
    for row, length in enumerate(LENGTHS.tolist()):
        alone = {
            name: field[row : row + 1, :length]
            for name, field in fields.items()
            if name != "lengths"
        }
        wanted = plain_outputs(model.forward_part(alone, ()).outputs)[0][0]
        found = padded[row] if spec.head == "sequence" else padded[row, :length]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_documents_of_a_row_are_apart_and_so_is_its_padding() -> None:
    model, fields = create(SMALL.replace(positions="none"), 1), fields_of(SMALL, 1)
    fields |= {"documents": torch.tensor([[0] * 5 + [1] * 19]), "lengths": torch.tensor([20])}
    found = plain_outputs(model.forward_part(fields, ()).outputs)[0]
    for first, last in ((0, 5), (5, 20)):
        alone = {name: fields[name][:, first:last] for name in ("ids", "token_types")}
        wanted = plain_outputs(model.forward_part(alone, ()).outputs)[0]
        torch.testing.assert_close(found[:, first:last], wanted, rtol=1e-4, atol=1e-5)


def test_the_last_position_is_that_of_the_row() -> None:
    spec = KINDS["token"].replace(head="sequence", pooling="last", head_layer="none")
    model, fields = create(spec, 1), fields_of(spec)
    (logits,) = model.forward_part(fields, ()).outputs
    states = create(spec.replace(head="none"), 1).forward_part(fields, ()).outputs[0]
    last = states[torch.arange(3), LENGTHS - 1]
    torch.testing.assert_close(logits, model.head(last))


def test_dropout_is_of_training_alone() -> None:
    spec = CLASSES.replace(head_dropout=0.5)
    model, fields = create(spec, 1), fields_of(spec)
    assert spec.drops
    plain = model.forward_part(fields, ()).outputs[0]
    keyed = {**fields, "dropout_keys": torch.arange(3)}
    one, other = (model.forward_part(keyed, ()).outputs[0] for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, plain)


@pytest.mark.parametrize("recompute", ["attention", "full", 2])
@pytest.mark.parametrize("kind", ["bert", "modernbert", "images"])
def test_recomputed_gradients_are_the_same_bits(kind: str, recompute: Any) -> None:
    spec = replace(KINDS[kind], dropout=0.1)
    fields = {**fields_of(spec), "dropout_keys": torch.arange(3)}
    gradients = []
    for each in ("none", recompute):
        model = create(spec, 1)
        model.set_recompute(each)
        plain_outputs(model.forward_part(fields, ()).outputs)[0].square().mean().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 30}, "image_size = 30 is not a multiple of patch_size = 16; take 16"),
        ({"image_size": 8}, "image_size = 8 is not a multiple of patch_size = 16; take 16"),
        ({"image_size": 32, "positions": "rotary"}, 'images has positions = "learned"'),
        ({"image_size": 32, "mels": 8, "head": "ctc"}, "sound, or images; drop one"),
        ({"mels": 8}, 'head = "lm" with token_types = 0 is of tokens'),
        ({"head_dropout": 1.0}, "head_dropout = 1 is the probability"),
        ({"positions": "sinusoidal", "width": 33, "heads": 3}, "need an even width of 4 or more"),
        ({"positions": "sinusoidal", "width": 2, "heads": 1}, "width is 2; set width to 4"),
        ({"window": 8, "full_every": 2, "full_first": 3}, "full_first = 3 is not one of the first"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        EncoderConfig(**changes)


def test_a_head_of_no_classes_and_an_image_of_another_size() -> None:
    with pytest.raises(RecipeError, match=r'model.head = "sequence" needs model.classes'):
        CLASSES.replace(classes=0).build()
    with pytest.raises(DataError, match=r"= \(1, 9, 8\) is none of the model, which reads \(1, 8"):
        create(IMAGES, 1)(torch.zeros(2, 1, 9, 8))
    with pytest.raises(ValueError, match="25 positions exceed the context of 24"):
        create(SMALL, 1)(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.parametrize("name", SHAPES)
def test_the_counted_parameters_of_shapes_are_the_models(name: str) -> None:
    spec = SHAPES[name]
    spec = spec.replace(vocab_size=spec.vocab_size or 777, classes=spec.classes or 10)
    with torch.device("meta"):
        model = spec.build()
    assert sum(weight.numel() for weight in model.parameters()) == spec.parameters
    assert spec.describe().startswith(f"{spec.layers} layers, width {spec.width}")


def test_the_named_shapes_have_the_sizes_of_the_released_models() -> None:
    # transformers: BertForMaskedLM, RobertaForMaskedLM, ModernBertForMaskedLM,
    # ViTForImageClassification.
    assert SHAPES["bert-base"].parameters == 109_514_298
    assert SHAPES["bert-large"].parameters == 335_174_458
    assert SHAPES["roberta-base"].parameters == 124_697_433
    assert SHAPES["modernbert-base"].parameters == 149_655_232
    assert SHAPES["vit-base-16"].replace(classes=1000).parameters == 86_567_656


def test_flops_count_what_positions_attend_to() -> None:
    spec = EncoderConfig(layers=1, width=8, heads=2, hidden=16, context=6, vocab_size=10, window=4)
    products = 4 * 8 * 8 + 2 * 8 * 16
    reached = sum(abs(i - j) <= 2 for i in range(6) for j in range(6)) / 6
    assert spec.block_flops[0] == 6 * products + 12 * 8 * reached
    assert spec.end_flops == (0, 6 * (8 * 8 + 10 * 8))
    assert spec.replace(window=0).block_flops[0] == 6 * products + 12 * 8 * 6
