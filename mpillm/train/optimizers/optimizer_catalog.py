"""The table of optimizers by name.

A recipe names one by `optimizer.name`; a plug-in is named as `package.module:Name`.
"""

from collections.abc import Mapping
from types import MappingProxyType

from mpillm.errors import RecipeError, UsageError
from mpillm.system.plugins import load_plugin
from mpillm.train.optimizers.optimizer import OptimizerSettings

OPTIMIZERS: Mapping[str, str] = MappingProxyType(
    {
        "adamw": "mpillm.train.optimizers.adamw:AdamWSettings",
    }
)
DEFAULT = "adamw"


def optimizer_class(name: str) -> type[OptimizerSettings]:
    """Return the settings class of an optimizer. Raises RecipeError for an unknown name."""
    try:
        found = load_plugin(name, OPTIMIZERS, "optimizer")
    except UsageError as failure:
        raise RecipeError(f"optimizer.name: {failure}") from failure
    if not (isinstance(found, type) and issubclass(found, OptimizerSettings)):
        raise RecipeError(
            f"optimizer.name = {name!r} must name a class that derives from "
            f"mpillm.train.optimizers.optimizer.OptimizerSettings, not {found!r}"
        )
    return found
