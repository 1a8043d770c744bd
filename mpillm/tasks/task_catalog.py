"""The tasks by name; a recipe names one by `task.name`, a user's own as `package.module:Name`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from mpillm.errors import RecipeError
from mpillm.system.plugins import is_plugin, load_plugin

if TYPE_CHECKING:
    from mpillm.tasks.task import Task

TASKS: Mapping[str, str] = MappingProxyType(
    {
        "causal-lm": "mpillm.tasks.causal_lm:CausalLM",
    }
)
DEFAULT = "causal-lm"


def check_task(name: str) -> None:
    """Raise RecipeError unless `name` may be a task; imports nothing, so that a login node without torch can check."""
    if name not in TASKS and not is_plugin(name):
        raise RecipeError(
            f"task.name = {name!r} is unknown; tasks: {', '.join(TASKS)}, or your own as package.module:Name"
        )


def make_task(name: str) -> "Task":
    """Make the task called `name`; imports torch. Raises UsageError for a name that is not known."""
    task: Task = load_plugin(name, TASKS, "task")()
    return task
