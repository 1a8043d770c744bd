"""The table of architectures by name, and their named shapes; needs no torch.

A recipe names an architecture by `model.architecture`, a well-known size by `model.shape`. A
plug-in is named as `package.module:Name`: a settings dataclass that derives from `ModelSpec`.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

from mpillm.errors import MismatchError, RecipeError, UsageError
from mpillm.models.spec import ModelSpec
from mpillm.system.plugins import load_class

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "decoder": "mpillm.models.decoder:DecoderConfig",
        "encoder": "mpillm.models.encoder:EncoderConfig",
        "encoder-decoder": "mpillm.models.encoder_decoder:EncoderDecoderConfig",
        "lstm": "mpillm.models.classifiers:LSTMConfig",
        "cnn": "mpillm.models.classifiers:CNNConfig",
        "mlp": "mpillm.models.classifiers:MLPConfig",
    }
)
DEFAULT = "decoder"


def spec_class(name: str) -> type[ModelSpec]:
    """Return the settings class of an architecture. Raises RecipeError for an unknown name."""
    try:
        return load_class(name, ARCHITECTURES, "architecture", ModelSpec)  # type: ignore[type-abstract]
    except UsageError as failure:
        raise RecipeError(f"model.architecture: {failure}") from failure


def named_shapes(architecture: str = "") -> dict[str, ModelSpec]:
    """Return the well-known sizes of `architecture`; without one, of the whole catalogue."""
    names = [architecture] if architecture else list(ARCHITECTURES)
    return {name: shape for known in names for name, shape in spec_class(known).shapes().items()}


def read_spec(section: Mapping[str, Any]) -> ModelSpec:
    """Build a spec from the section [model] of a checkpoint's recipe.

    Releases before the key `architecture` had the decoder alone. Raises MismatchError for settings
    that this mpillm does not know, such as those of a later release, and for values of a wrong
    type.
    """
    # Imported here, as recipes do: a login node that reads no model need not load it.
    from pydantic import TypeAdapter, ValidationError

    kind = spec_class(str(section.get("architecture", DEFAULT)))
    assert is_dataclass(kind)
    unknown = sorted(set(section) - {field.name for field in fields(kind)})
    if unknown:
        raise MismatchError(
            "the model was made with settings that this mpillm does not know: "
            f"{', '.join(unknown)}; use the release, or the plug-in, that it was made with"
        )
    try:
        # As JSON: its lists become the tuples of settings.
        read: ModelSpec = TypeAdapter(kind).validate_json(json.dumps(section))
    except ValidationError as failure:
        first = failure.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise MismatchError(
            f"the model was made with settings that cannot be: {place} {first['msg']}; "
            "use another checkpoint"
        ) from failure
    return read
