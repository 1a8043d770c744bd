"""Resolve a recipe's layout: what a run and its dry run decide alike, without torch and MPI."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from mpillm.errors import LayoutError, MismatchError, RecipeError
from mpillm.models.spec import ModelSpec
from mpillm.parallel.axis_sizes import batch_share
from mpillm.parallel.expert.expert_groups import check_experts
from mpillm.parallel.islands.rounds import check_rounds
from mpillm.parallel.step_plan import StepPlan, check_small_batches, plan_step
from mpillm.parallel.teacher_plan import TeacherPlan
from mpillm.runs.folder import CLUSTER
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.samples import RowShape, SampleReader
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


def plan_run(recipe: Recipe, sizes: Mapping[str, int]) -> StepPlan:
    """Plan the step of a run on a mesh of `sizes`.

    Raises LayoutError and RecipeError for what cannot be.
    """
    settings, data = recipe.train, batch_share(sizes)[1]
    check_rounds(recipe.parallel, settings.evaluate_every, settings.save_every)
    check_experts(
        recipe.parallel.experts,
        recipe.model,
        sizes,
        fixed_order=settings.fixed_order,
        noise_scale=bool(settings.noise_scale),
    )
    plan = plan_step(
        recipe.model,
        recipe.parallel,
        data,
        settings.batch,
        settings.microbatch,
        fixed_order=settings.fixed_order,
        recompute=settings.recompute,
    )
    _check_context(recipe)
    if settings.noise_scale and recipe.parallel.island > 1:
        raise LayoutError(
            "train.noise_scale compares the gradients of all ranks at one step, and the ranks of "
            "parallel.island train alone; leave one of them out"
        )
    if settings.noise_scale:
        check_small_batches(plan, data, recipe.parallel.zero)
    if recipe.data.document_mask and "documents" not in recipe.model.shared_inputs:
        raise RecipeError(
            f"data.document_mask = true needs a model that reads documents, and the architecture "
            f"{recipe.model.architecture} does not; leave document_mask out"
        )
    _check_tensor(recipe)
    _check_tuning(recipe)
    return replace(plan, tuning=recipe.tuning)


def plan_teacher(
    recipe: Recipe,
    numbers_documents: bool,
    plan: StepPlan,
    teacher: ModelSpec,
    sizes: Mapping[str, int],
) -> StepPlan:
    """Return the plan of a run that learns from `teacher`, on a mesh of `sizes`.

    `numbers_documents`: whether rows come with the numbers of documents. Raises MismatchError where
    the run's batches are none of the teacher's, LayoutError and RecipeError for what cannot be.
    """
    made = TeacherPlan.of(recipe.distillation, recipe.model, teacher)
    made.check_fit(recipe.model, recipe.distillation.teacher)
    made.check_layout(plan.parts, sizes)
    if numbers_documents and "documents" not in teacher.shared_inputs:
        raise MismatchError(
            f"distillation.teacher: rows hold several documents, kept apart, and the architecture "
            f"{teacher.architecture} of {recipe.distillation.teacher} does not read them; set "
            "data.pack = false or data.document_mask = false, or take another teacher"
        )
    tuning = replace(plan.tuning, projections=made.projections)
    return replace(plan, teacher=made, tuning=tuning)


def profile_path(recipe: Recipe) -> Path | None:
    """Return the cluster's profile: the one the recipe names, else the one in the run's folder.

    None without either.
    """
    in_run = Path(recipe.train.run) / CLUSTER
    if recipe.parallel.profile:
        return Path(recipe.parallel.profile)
    return in_run if in_run.exists() else None


def _check_tensor(recipe: Recipe) -> None:
    """Raise RecipeError or LayoutError for what no run along a tensor axis has."""
    if recipe.parallel.tensor == 1:
        return
    given = f"parallel.tensor = {recipe.parallel.tensor}"
    if recipe.train.compile:
        raise RecipeError(
            f"train.compile = true compiles a layer as a whole, and {given} exchanges the stream "
            "within it; leave one of them out"
        )
    if recipe.train.noise_scale:
        raise RecipeError(
            f"train.noise_scale = {recipe.train.noise_scale} compares gradients before they are "
            f"summed, and with {given} a rank has a share of each norm's; leave one of them out"
        )
    if not recipe.optimizer.elementwise:
        raise LayoutError(
            f"the optimizer {recipe.optimizer.name} needs whole weights, and {given} cuts the "
            "matrices of each layer; take adamw, lion or sgd, or leave parallel.tensor out"
        )


def _check_tuning(recipe: Recipe) -> None:
    """Raise RecipeError or LayoutError for what no run of adapters, or frozen weights, has."""
    adapter, parallel = recipe.adapter, recipe.parallel
    if not recipe.tuning.freezes:
        return
    given = f"adapter.method = {adapter.method}" if adapter.used else "train.freeze"
    if parallel.experts > 1:
        raise LayoutError(
            f"{given} keeps the weights of the base on each host, and parallel.experts = "
            f"{parallel.experts} shares out those of experts; leave one of them out"
        )
    if not adapter.used:
        return
    if not recipe.train.start_from:
        raise RecipeError(
            f"{given} trains next to the frozen weights of a base; name a run, a checkpoint or a "
            "Hugging Face folder by train.start_from"
        )
    if recipe.train.freeze:
        raise RecipeError(
            f"{given} freezes all weights of the base; leave train.freeze out, and name those "
            "that are trained all the same in adapter.also"
        )
    if recipe.train.compile:
        raise RecipeError(
            f"train.compile = true compiles layers without adapters, and {given} adds some; "
            "leave one of them out"
        )
    if parallel.tensor > 1 and (adapter.method == "dora" or adapter.base != "float32"):
        name = "method" if adapter.method == "dora" else "base"
        raise LayoutError(
            f"adapter.{name} = {getattr(adapter, name)} needs whole rows of each weight, and "
            f"parallel.tensor = {parallel.tensor} cuts them; take lora with base = float32, or "
            "leave parallel.tensor out"
        )
    if adapter.dropout:
        _check_adapter_dropout(recipe)


def _check_adapter_dropout(recipe: Recipe) -> None:
    """Raise LayoutError or RecipeError where an adapter does not know its input's place."""
    given = f"adapter.dropout = {recipe.adapter.dropout}"
    if recipe.parallel.tensor > 1:
        raise LayoutError(
            f"{given} needs whole inputs of each layer, and parallel.tensor = "
            f"{recipe.parallel.tensor} cuts them; leave one of them out"
        )
    if recipe.model.experts:
        raise RecipeError(f"{given} needs whole sequences, and experts see positions; leave it out")
    if recipe.train.recompute == "attention" and recipe.parallel.pipeline > 1:
        raise RecipeError(
            f"{given} in a pipeline needs whole layers to be computed again, and train.recompute = "
            '"attention" computes a part of each; take "full", or leave one of them out'
        )


def _check_context(recipe: Recipe) -> None:
    """Raise LayoutError for what needs whole sequences on a rank, where ranks share them."""
    given = f"parallel.context = {recipe.parallel.context}"
    if recipe.parallel.context == 1:
        return
    for name in ("compile", "noise_scale"):
        if getattr(recipe.train, name):
            raise LayoutError(
                f"train.{name} computes with whole sequences, which {given} shares among ranks; "
                "leave one of them out"
            )


def row_lengths(recipe: Recipe, plan: StepPlan) -> Lengths:
    """Return the lengths of the rows of pairs.

    Stages exchange streams of one length, and compiled layers have one. So has a fixed order: its
    bits are those of a pipeline.
    """
    of_model = Lengths.of(recipe.model)
    one = plan.schedule.ranks > 1 or plan.context > 1 or plan.compiled or plan.fixed_order
    return replace(of_model, trims=of_model.trims and not one)


def as_read(recipe: Recipe, plan: StepPlan, reader: SampleReader) -> Recipe:
    """Return the recipe for the memory of its steps, whose rows are as short as the data allow.

    Raises DataError.
    """
    if not isinstance(reader, PairReader):
        return recipe
    row = RowShape(0, row_lengths(recipe, plan))
    longest = reader.trimmed(np.arange(reader.n_pairs), row).lengths
    if longest == row.lengths:
        return recipe
    model = recipe.model.replace(context=longest.context)
    if model.source_context != longest.source_context:
        model = model.replace(source_context=longest.source_context)
    return replace(recipe, model=model)
