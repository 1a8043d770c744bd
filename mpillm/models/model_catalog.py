"""The architectures by name, and the named shapes of each; needs no torch.

A recipe names an architecture by `model.architecture`, a well-known size by `model.shape`. A user's own architecture is
named as `package.module:Name`, where Name is a settings dataclass that derives from `ModelSpec`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mpillm.errors import RecipeError, UsageError
from mpillm.models.spec import ModelSpec
from mpillm.system.plugins import load_plugin

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "decoder": "mpillm.models.decoder:DecoderConfig",
    }
)
DEFAULT = "decoder"


def spec_class(name: str) -> type[ModelSpec]:
    """Return the settings class of an architecture. Raises RecipeError for an unknown name."""
    try:
        found = load_plugin(name, ARCHITECTURES, "architecture")
    except UsageError as failure:
        raise RecipeError(f"model.architecture: {failure}") from failure
    if not (isinstance(found, type) and issubclass(found, ModelSpec)):
        raise RecipeError(
            f"model.architecture = {name!r} must name a class that derives from mpillm.models.spec.ModelSpec, "
            f"not {found!r}"
        )
    return found


def named_shapes() -> dict[str, ModelSpec]:
    """Return the well-known sizes of all architectures in the catalogue."""
    return {
        name: shape for known in ARCHITECTURES for name, shape in spec_class(known).shapes().items()
    }


def read_spec(section: Mapping[str, Any]) -> ModelSpec:
    """Build a spec from the section [model] of a checked recipe, as a checkpoint holds it.

    A section of a release before architectures had names is a decoder's.
    """
    return spec_class(str(section.get("architecture", DEFAULT)))(**section)
