"""The teacher of a run at rest: found and compared with the run ahead of its first step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.comm.failure import on_all
from mpillm.errors import CheckpointError, MismatchError, RecipeError
from mpillm.infer.model_source import ModelSource, describe_base, open_model
from mpillm.models.spec import ModelSpec
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.system.console import Console
from mpillm.tasks.task import Task
from mpillm.tokens.manifest import Manifest
from mpillm.train.recipe import Recipe
from mpillm.train.start_from import check_tokenizer
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.model_settings import model_settings
from mpillm.weights.open_source import open_source

if TYPE_CHECKING:
    from mpi4py import MPI

TEACHER = "teacher"
"""The fact of a checkpoint that names the teacher of its run: `path` and `digest`."""
SETTING = "distillation.teacher"


@dataclass(frozen=True)
class TeacherSource:
    """The teacher of a run."""

    path: Path
    model: ModelSource
    comm: "MPI.Intracomm"

    def fill(
        self, model: ShardedModel, checkpoint: Checkpoint | None, warn: Callable[[str], None]
    ) -> dict[str, Any]:
        """Let `model` learn from the teacher; return the fact that names it. Every rank calls it.

        Raises MismatchError where the run of `checkpoint` has learnt from another one so far.
        """
        fact = describe_base(self.path, self.model, self.comm)
        known: Any = checkpoint.facts.get(TEACHER) if checkpoint else None
        if isinstance(known, Mapping) and known.get("digest") != fact["digest"]:
            raise MismatchError(
                f"{SETTING}: {self.path} is another model than the one that the run has learnt "
                f"from so far, which was {known.get('path')}: its weights have another digest; "
                "name that one, such as a checkpoint of its run"
            )
        frozen = model.learn_from(warn).frozen

        def fill() -> None:
            for name, shape in frozen.shapes.items() if frozen.fills else ():
                if (found := self.model.shapes.get(name)) != shape:
                    raise CheckpointError(
                        f"{SETTING}: {self.path} holds {name} as {found}, and its settings need "
                        f"{shape}; use another checkpoint"
                    )
                frozen.fill(name, self.model.read(name))

        on_all(self.comm, fill)
        frozen.filled()
        return {TEACHER: fact}


def find_teacher(
    recipe: Recipe, task: Task, manifest: Manifest, comm: "MPI.Intracomm", console: Console
) -> TeacherSource | None:
    """Open the teacher of a recipe; None without one. Every rank calls it.

    Raises RecipeError, CheckpointError or MismatchError where the run cannot learn from it.
    """
    if not recipe.distillation.teacher:
        return None
    check_distils(recipe, task)
    path = Path(recipe.distillation.teacher)
    try:
        source = open_source(path, comm, console)
        found = open_model(source, comm, console)
    except CheckpointError as failure:
        raise CheckpointError(f"{SETTING}: {failure}") from failure
    check_tokenizer(SETTING, source, manifest, comm)
    if found.classes and manifest.classes and found.classes != manifest.classes:
        raise MismatchError(
            f"{SETTING}: {path} has other classes than the data {manifest.folder}, or in another "
            "order; prepare the data with the teacher's labels"
        )
    return TeacherSource(source.path, found, comm)


def teacher_settings(recipe: Recipe) -> ModelSpec:
    """Read the settings of the teacher, without its weights. Raises CheckpointError."""
    try:
        return model_settings(Path(recipe.distillation.teacher))
    except CheckpointError as failure:
        raise CheckpointError(f"{SETTING}: {failure}") from failure


def check_distils(recipe: Recipe, task: Task) -> None:
    """Raise RecipeError for a task that learns from no teacher, or from no layers of it."""
    if not recipe.distillation.teacher:
        return
    if not task.distils:
        raise RecipeError(
            f"{SETTING}: the divergence from a teacher is of distributions over tokens or classes, "
            f"and the loss of the task {task.name} is no cross-entropy of mpillm's over them; "
            "leave the teacher out, or take another task"
        )
    if recipe.distillation.layer_pairs and task.output_kind == "a class of each row":
        raise RecipeError(
            f"distillation.hidden = {recipe.distillation.hidden} weighs positions as their "
            f"targets, and the task {task.name} has one target a row; leave hidden out"
        )
