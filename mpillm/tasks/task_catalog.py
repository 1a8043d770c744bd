"""The table of tasks by name.

A recipe names one by `task.name`; a plug-in is named as `package.module:Name`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from mpillm.errors import RecipeError
from mpillm.system.plugins import is_plugin, load_class

if TYPE_CHECKING:
    from mpillm.tasks.task import Task

TASKS: Mapping[str, str] = MappingProxyType(
    {
        "causal-lm": "mpillm.tasks.causal_lm:CausalLM",
    }
)
DEFAULT = "causal-lm"


def check_task(name: str) -> None:
    """Raise RecipeError unless `name` may be a task."""
    # Nothing is imported: a task imports torch, which a login node may not have.
    if name not in TASKS and not is_plugin(name):
        raise RecipeError(
            f"task.name = {name!r} is unknown; tasks: {', '.join(TASKS)}, "
            "or a plug-in as package.module:Name"
        )


def make_task(name: str) -> "Task":
    """Make the task called `name`; imports torch. Raises UsageError for an unknown name."""
    from mpillm.tasks.task import Task

    return load_class(name, TASKS, "task", Task)()  # type: ignore[type-abstract]
