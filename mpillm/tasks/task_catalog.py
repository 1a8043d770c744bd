"""The table of tasks by name.

A recipe names one by `task.name`; a plug-in is named as `package.module:Name`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Lt

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


@dataclass(frozen=True)
class TaskSettings:
    """The task: fields, targets and loss of a batch."""

    name: str = DEFAULT
    """A task of the catalogue, or a plug-in as `package.module:Name`."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """The share of a target's probability that all tokens share; in training only."""
    z_loss: Annotated[float, Ge(0), Lt(1)] = 0.0
    """The factor of log² Z in the loss of training, such as 1e-4."""

    def __post_init__(self) -> None:
        check_task(self.name)


def check_task(name: str) -> None:
    """Raise RecipeError unless `name` may be a task."""
    # Nothing is imported: a task imports torch, which a login node may not have.
    if name not in TASKS and not is_plugin(name):
        raise RecipeError(
            f"task.name = {name!r} is unknown; tasks: {', '.join(TASKS)}, "
            "or a plug-in as package.module:Name"
        )


def make_task(name: str, settings: TaskSettings | None = None) -> "Task":
    """Make the task called `name`; imports torch. Raises UsageError for an unknown name.

    `settings`: of training; None: an evaluation's. Raises RecipeError where the task has no
    cross-entropy for them.
    """
    from mpillm.tasks.cross_entropy import CrossEntropyTask
    from mpillm.tasks.task import Task

    kind = load_class(name, TASKS, "task", Task)  # type: ignore[type-abstract]
    terms = {}
    if settings is not None:
        terms = {"label_smoothing": settings.label_smoothing, "z_loss": settings.z_loss}
    if not any(terms.values()):
        return kind()
    if not issubclass(kind, CrossEntropyTask):
        named = " and ".join(f"task.{key} = {value:g}" for key, value in terms.items() if value)
        raise RecipeError(
            f"{named} changes a cross-entropy, and the task {name} has none of mpillm's; leave it "
            "out, or derive the task from CrossEntropyTask"
        )
    return kind(**terms)
