"""What a run that writes its own answers cannot have: found before anything is loaded."""

from collections.abc import Mapping

from mpillm.errors import LayoutError, RecipeError
from mpillm.train.recipe import Recipe

ALONE = "data"
"""The axis whose ranks hold whole models."""


def check_rollouts(recipe: Recipe, sizes: Mapping[str, int]) -> None:
    """Raise LayoutError or RecipeError for what no run that writes answers has.

    `sizes`: of the mesh.
    """
    task, train = recipe.task, recipe.train
    name = task.name
    if not train.start_from:
        raise RecipeError(
            f"the task {name} learns from rewards of answers that the model writes, and "
            "train.start_from names no model that writes some which are right; name the run of an "
            "instruction tuning, such as --set train.start_from=runs/chat"
        )
    cut = [axis for axis, size in sizes.items() if axis != ALONE and size > 1]
    if recipe.parallel.experts > 1:
        cut.append("experts")
    if cut:
        raise LayoutError(
            f"the task {name} generates with a whole model on each rank, which parallel.{cut[0]} "
            "cuts over several; leave it out, and share the batch by the data axis alone, with "
            "parallel.zero where memory is short"
        )
    if train.batch % task.group:
        raise RecipeError(
            f"train.batch = {train.batch} answers are no whole groups of task.group = "
            f"{task.group}; take a multiple, such as "
            f"{max(1, round(train.batch / task.group)) * task.group}"
        )
    if train.compile:
        raise RecipeError(
            "train.compile = true needs the same computation in every step, and the rows of the "
            f"task {name} are as long as the answers; leave it out"
        )
    if recipe.data.document_mask:
        raise RecipeError(
            f"data.document_mask = true is of rows with several documents, and the task {name} "
            "writes one answer a row; leave it out"
        )
