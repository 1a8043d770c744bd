"""Which weights are trained, by their names."""

import pytest

from mpillm.errors import RecipeError
from mpillm.models.decoder import DecoderConfig
from mpillm.models.tuning import (
    ALL_WEIGHTS,
    AdapterSettings,
    Tuning,
    freeze_patterns,
    layer_of,
    read_tuning,
)

MODEL = DecoderConfig(layers=4, width=64, heads=4, context=32, vocab_size=256)


def test_first_layers_have_the_embeddings_ahead_of_them() -> None:
    tuning = Tuning(freeze=freeze_patterns(2))
    for name in ("embedding.weight", "layers.0.norm.weight", "layers.1.attention.query.weight"):
        assert tuning.is_frozen(name)
    for name in ("layers.2.norm.weight", "norm.weight", "head.weight"):
        assert not tuning.is_frozen(name)
    assert not Tuning(freeze=freeze_patterns(0)).freezes
    assert Tuning(freeze=("*.norm.*",)).is_frozen("layers.3.norm.weight")


def test_targets_are_names_or_globs() -> None:
    usual = AdapterSettings(method="lora")
    assert usual.is_target("layers.0.feed_forward.down")
    assert not usual.is_target("layers.0.feed_forward.router")
    some = AdapterSettings(method="lora", targets=("query", "layers.3.*"))
    assert some.is_target("layers.0.attention.query")
    assert some.is_target("layers.3.feed_forward.up")
    assert not some.is_target("layers.0.feed_forward.up")
    assert layer_of("layers.0.up.adapter.a") == "layers.0.up"
    assert layer_of("layers.0.up.weight") == ""


def test_names_of_no_layer_or_weight_are_refused_with_those_that_there_are() -> None:
    layers, weights = ["layers.0.query", "layers.0.up"], ["layers.0.query.weight", "norm.weight"]
    for tuning, message in (
        (Tuning(AdapterSettings(method="lora", targets=("quary",))), "'quary'.* are query, up;"),
        (Tuning(AdapterSettings(method="lora", also=("head",))), r"adapter\.also names 'head'"),
        (Tuning(freeze=("head.*",)), r"layers\.\*\.query\.weight, norm\.weight"),
        (Tuning(freeze=("*",)), "freezes all weights"),
        (Tuning(freeze=("2",)), r"freeze = 2 is more layers than the model has \(1\)"),
    ):
        with pytest.raises(RecipeError, match=message):
            tuning.check_names(layers, weights)
    with pytest.raises(RecipeError, match="needs linear layers in blocks"):
        Tuning(AdapterSettings(method="lora")).check_names([], weights)


def test_the_trained_parameters_are_about_those_of_adapters() -> None:
    assert ALL_WEIGHTS.share_of(MODEL) == 1.0
    tuning = Tuning(AdapterSettings(method="lora", rank=4))
    hidden = MODEL.hidden_width
    exact = 4 * 4 * (4 * (64 + 64) + 3 * (64 + hidden))
    assert tuning.trained_of(MODEL, MODEL.whole) == pytest.approx(exact, rel=0.3)
    assert 0.3 < Tuning(freeze=("2",)).share_of(MODEL) < 0.9


def test_a_recipe_of_an_earlier_release_trains_all() -> None:
    assert read_tuning({"train": {"seed": 1}}) == ALL_WEIGHTS
    section = {"method": "lora", "targets": ["query"], "later": 1}
    found = read_tuning({"adapter": section, "train": {"freeze": 2}})
    assert found.adapter.targets == ("query",)
    assert found.freeze == ("2",)
