"""The table of architectures by name, and their named shapes; needs no torch.

A recipe names an architecture by `model.architecture`, a well-known size by `model.shape`. A
plug-in is named as `package.module:Name`: a settings dataclass that derives from `ModelSpec`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mpillm.errors import RecipeError, UsageError
from mpillm.models.spec import ModelSpec
from mpillm.system.plugins import load_class

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "decoder": "mpillm.models.decoder:DecoderConfig",
    }
)
DEFAULT = "decoder"


def spec_class(name: str) -> type[ModelSpec]:
    """Return the settings class of an architecture. Raises RecipeError for an unknown name."""
    try:
        return load_class(name, ARCHITECTURES, "architecture", ModelSpec)  # type: ignore[type-abstract]
    except UsageError as failure:
        raise RecipeError(f"model.architecture: {failure}") from failure


def named_shapes() -> dict[str, ModelSpec]:
    """Return the well-known sizes of all architectures in the catalogue."""
    # Plug-ins are not in the catalogue: a recipe gives their settings key by key.
    return {
        name: shape for known in ARCHITECTURES for name, shape in spec_class(known).shapes().items()
    }


def read_spec(section: Mapping[str, Any]) -> ModelSpec:
    """Build a spec from the section [model] of a checkpoint's recipe.

    Releases before the key `architecture` had the decoder alone.
    """
    return spec_class(str(section.get("architecture", DEFAULT)))(**section)
