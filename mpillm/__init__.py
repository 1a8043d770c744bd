"""Train large language models on HPC clusters over MPI; docs/api.md lists what is exported."""

import importlib
from collections.abc import Mapping
from types import MappingProxyType

# Loading typing takes 10 ms, in which Ctrl-C would print a traceback (system/ending_signals.py).
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mpillm.comm.communicator import Communicator as Communicator
    from mpillm.comm.mesh import Mesh as Mesh
    from mpillm.errors import MpillmError as MpillmError
    from mpillm.models.linear_head import LinearHead as LinearHead
    from mpillm.models.part_module import PartModule as PartModule
    from mpillm.models.part_module import PartOutput as PartOutput
    from mpillm.models.spec import ModelSpec as ModelSpec
    from mpillm.models.spec import Part as Part
    from mpillm.system.console import Console as Console
    from mpillm.tasks.cross_entropy import CrossEntropyTask as CrossEntropyTask
    from mpillm.tasks.metrics.metric import Metric as Metric
    from mpillm.tasks.task import Task as Task
    from mpillm.tokens.prepare import PrepareOptions as PrepareOptions
    from mpillm.tokens.prepare import prepare as prepare
    from mpillm.train.optimizers.optimizer import OptimizerSettings as OptimizerSettings
    from mpillm.train.recipe import Recipe as Recipe
    from mpillm.train.recipe import load_recipe as load_recipe
    from mpillm.train.setup import train as train_recipe  # noqa: F401

# A name is imported when it is first used: `import mpillm` loads neither torch nor MPI.
EXPORTS: Mapping[str, str] = MappingProxyType(
    {
        "Communicator": "mpillm.comm.communicator:Communicator",
        "Mesh": "mpillm.comm.mesh:Mesh",
        "Recipe": "mpillm.train.recipe:Recipe",
        "load_recipe": "mpillm.train.recipe:load_recipe",
        # `mpillm.train` is the room, so the function has a longer name here.
        "train_recipe": "mpillm.train.setup:train",
        "PrepareOptions": "mpillm.tokens.prepare:PrepareOptions",
        "prepare": "mpillm.tokens.prepare:prepare",
        "Console": "mpillm.system.console:Console",
        "ModelSpec": "mpillm.models.spec:ModelSpec",
        "Part": "mpillm.models.spec:Part",
        "PartModule": "mpillm.models.part_module:PartModule",
        "PartOutput": "mpillm.models.part_module:PartOutput",
        "LinearHead": "mpillm.models.linear_head:LinearHead",
        "Task": "mpillm.tasks.task:Task",
        "CrossEntropyTask": "mpillm.tasks.cross_entropy:CrossEntropyTask",
        "Metric": "mpillm.tasks.metrics.metric:Metric",
        "OptimizerSettings": "mpillm.train.optimizers.optimizer:OptimizerSettings",
        "MpillmError": "mpillm.errors:MpillmError",
    }
)


def __getattr__(name: str) -> "Any":
    """Import an exported name from its module. Raises AttributeError for any other."""
    if name not in EXPORTS:
        raise AttributeError(
            f"module 'mpillm' exports no {name!r}; it exports {', '.join(EXPORTS)}"
        )
    module, _, attribute = EXPORTS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    """List the exported names, for completion."""
    return sorted({*globals(), *EXPORTS})
