"""Resolve a recipe's layout: what a run and its dry run decide alike, without torch and MPI."""

from collections.abc import Mapping
from dataclasses import replace

from mpillm.errors import MismatchError, RecipeError
from mpillm.parallel.step_plan import StepPlan, check_small_batches, plan_step
from mpillm.train.recipe import Recipe


def fill_model(recipe: Recipe, found: Mapping[str, int]) -> Recipe:
    """Fill the model's settings that follow from the data: setting → its value there.

    Raises MismatchError where the recipe sets one lower than the data needs, RecipeError where the
    model lacks it.
    """
    model = recipe.model
    for name, least in found.items():
        wanted = getattr(model, name, None)
        if wanted is None:
            raise RecipeError(
                f"the task {recipe.task.name} needs a model with the setting {name}, and the "
                f"architecture {model.architecture} has none; choose another model.architecture"
            )
        if wanted and wanted < least:
            raise MismatchError(
                f"model.{name} = {wanted:,} is smaller than the {least:,} of the data "
                f"{recipe.data.path}; leave it out to take the data's"
            )
        model = model.replace(**{name: wanted or least})
    return replace(recipe, model=model)


def plan_run(recipe: Recipe, data: int) -> StepPlan:
    """Plan the step of a run whose batch is shared by `data` ranks.

    Raises LayoutError and RecipeError for what cannot be.
    """
    settings = recipe.train
    plan = plan_step(
        recipe.model,
        recipe.parallel,
        data,
        settings.batch,
        settings.microbatch,
        fixed_order=settings.fixed_order,
        recompute=settings.recompute,
    )
    for name in ("compile", "noise_scale") if recipe.parallel.context > 1 else ():
        if getattr(settings, name):
            raise RecipeError(
                f"train.{name} computes with whole sequences, which parallel.context = "
                f"{recipe.parallel.context} shares among ranks; leave one of them out"
            )
    if settings.noise_scale:
        check_small_batches(plan, data, recipe.parallel.zero)
    if recipe.data.document_mask and "documents" not in recipe.model.shared_inputs:
        raise RecipeError(
            f"data.document_mask = true needs a model that reads documents, and the architecture "
            f"{recipe.model.architecture} does not; leave document_mask out"
        )
    return plan
