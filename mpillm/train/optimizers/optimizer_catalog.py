"""The table of optimizers by name.

A recipe names one by `optimizer.name`; a plug-in is named as `package.module:Name`.
"""

from collections.abc import Mapping
from types import MappingProxyType

from mpillm.errors import RecipeError, UsageError
from mpillm.system.plugins import load_class
from mpillm.train.optimizers.optimizer import OptimizerSettings

OPTIMIZERS: Mapping[str, str] = MappingProxyType(
    {
        "adamw": "mpillm.train.optimizers.adamw:AdamWSettings",
        "muon": "mpillm.train.optimizers.muon:MuonSettings",
        "adafactor": "mpillm.train.optimizers.adafactor:AdafactorSettings",
        "sgd": "mpillm.train.optimizers.sgd:SGDSettings",
        "lion": "mpillm.train.optimizers.lion:LionSettings",
    }
)
DEFAULT = "adamw"


def optimizer_class(name: str) -> type[OptimizerSettings]:
    """Return the settings class of an optimizer. Raises RecipeError for an unknown name."""
    try:
        return load_class(name, OPTIMIZERS, "optimizer", OptimizerSettings)  # type: ignore[type-abstract]
    except UsageError as failure:
        raise RecipeError(f"optimizer.name: {failure}") from failure
