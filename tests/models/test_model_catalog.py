from pathlib import Path

import pytest

from mpillm.errors import RecipeError
from mpillm.models.decoder import SHAPES, DecoderConfig
from mpillm.models.model_catalog import ARCHITECTURES, named_shapes, read_spec, spec_class
from mpillm.models.spec import ModelSpec


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a user's own module, with one architecture and one object that is none."""
    (tmp_path / "own_models.py").write_text(
        "from dataclasses import dataclass\n"
        "from mpillm.models.decoder import DecoderConfig\n"
        "@dataclass(frozen=True)\n"
        "class Deep(DecoderConfig):\n"
        "    architecture: str = 'own_models:Deep'\n"
        "    layers: int = 99\n"
        "NUMBER = 7\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_models"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_entry_is_a_spec_that_names_itself(name: str) -> None:
    assert issubclass(spec_class(name), ModelSpec)
    assert spec_class(name)().architecture == name


def test_a_plugin_is_an_architecture(package: str) -> None:
    assert spec_class(f"{package}:Deep")().blocks == 99


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("decodr", r"model.architecture: no architecture is called 'decodr', did you mean decoder"),
        ("nowhere.at_all:Model", "cannot be imported"),
        ("own_models:Missing", "has no Missing"),
        ("own_models:NUMBER", r"must name a class that derives from mpillm.models.spec.ModelSpec"),
        ("pathlib:Path", r"must name a class that derives from mpillm.models.spec.ModelSpec"),
    ],
)
def test_a_wrong_architecture_is_a_recipe_error(package: str, name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        spec_class(name)


def test_the_named_shapes_are_those_of_all_architectures() -> None:
    assert {name: named_shapes()[name] for name in SHAPES} == dict(SHAPES)


def test_a_checkpoint_without_an_architecture_is_a_decoder_s() -> None:
    """Releases before the key `architecture` wrote none."""
    assert read_spec({"layers": 3, "width": 64}) == DecoderConfig(layers=3, width=64)
    assert read_spec({"architecture": "decoder", "layers": 3}) == DecoderConfig(layers=3)
