"""Set up a run from its recipe: mesh, plan, model, checkpoint; then train."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_root
from mpillm.errors import MismatchError, RecipeError, UsageError
from mpillm.machine.cluster_profile import Cluster, ClusterProfile, describe_cluster, load_profile
from mpillm.machine.node_map import NodeMap, map_nodes
from mpillm.models.model_catalog import read_spec
from mpillm.models.spec import ModelSpec
from mpillm.parallel.step_plan import make_mesh, plan_step
from mpillm.runs.folder import CLUSTER, METRICS
from mpillm.system.atomic import make_folder
from mpillm.system.console import Console
from mpillm.system.malloc import keep_pages
from mpillm.tasks import task_catalog
from mpillm.tasks.task_catalog import make_task
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.order import WindowOrder
from mpillm.tokens.reader import open_split
from mpillm.train.loop import JobLimits, TrainingLoop, locked_run
from mpillm.train.optimizers import optimizer_catalog
from mpillm.train.print_plan import print_plan
from mpillm.train.recipe import Recipe
from mpillm.train.step import Trainer
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.finding import newest_whole
from mpillm.weights.places import CHECKPOINTS

if TYPE_CHECKING:
    from mpi4py import MPI

NO_LIMITS = JobLimits()


def train(
    recipe: Recipe,
    comm: "MPI.Intracomm",
    console: Console,
    resume: bool = False,
    trace: bool = False,
    limits: JobLimits = NO_LIMITS,
    node_map: NodeMap | None = None,
) -> None:
    """Train as the recipe says. Every rank calls it.

    `resume`: continue from the newest whole checkpoint of the run, if it has any. `trace`: write a
    file that shows when each rank computed. `node_map`: of `comm`; None asks MPI for it. Raises
    subclasses of MpillmError.
    """
    keep_pages()
    manifest = Manifest.load(recipe.data.path)
    recipe = replace(recipe, model=_with_vocabulary(recipe, manifest))
    settings, parallel = recipe.train, recipe.parallel
    node_map = node_map or map_nodes(comm)
    mesh = make_mesh(comm, parallel, recipe.model, settings.batch, node_map)
    data = mesh.axis("data")
    plan = plan_step(
        recipe.model,
        parallel,
        data.size,
        settings.batch,
        settings.microbatch,
        dtype=settings.dtype,
        fixed_order=settings.fixed_order,
    )
    task = make_task(recipe.task.name)
    _check_mask(recipe)
    with open_split(recipe.data.path, "train") as reader:
        # Before the run has a folder: a dataset shorter than one context, or a missing profile,
        # must leave nothing to clean up.
        WindowOrder(reader.n_tokens, recipe.model.context, settings.seed)
        cluster = describe_cluster(comm, node_map)
        profile = _profile(recipe, comm, console, cluster)
        folder = Path(settings.run)
        make_folder(folder)
        with locked_run(folder, comm, limits.job):
            checkpoint = _find_start(recipe, manifest, comm, console, resume)
            print_plan(recipe, mesh, plan, reader, console)
            trainer = Trainer(recipe, task, reader, mesh, plan, profile, console.warn)
            if data.size > 1:
                console.say(f"gradients: {trainer.model.gradients.describe()}")
            if plan.schedule.ranks > 1:
                console.say(f"stages: {trainer.describe_pipeline()}")
            loop = TrainingLoop(recipe, manifest, trainer, console, trace, limits, cluster)
            loop.run(checkpoint)
            trainer.close()


def _check_mask(recipe: Recipe) -> None:
    """Raise RecipeError for a document mask that the model would ignore."""
    if recipe.data.document_mask and "documents" not in recipe.model.shared_inputs:
        raise RecipeError(
            f"data.document_mask = true needs a model that reads documents, and the architecture "
            f"{recipe.model.architecture} does not; leave document_mask out"
        )


def _profile(
    recipe: Recipe, comm: "MPI.Intracomm", console: Console, here: Cluster
) -> ClusterProfile | None:
    """Load the cluster's profile: the one the recipe names, else the one in the run's folder.

    Returns None without either. Every rank calls it.
    """
    in_run = Path(recipe.train.run) / CLUSTER
    named = Path(recipe.parallel.profile) if recipe.parallel.profile else None

    def load() -> ClusterProfile | None:
        path = named or (in_run if in_run.exists() else None)
        return load_profile(path, console.warn, here) if path else None

    return on_root(comm, load)


def _with_vocabulary(recipe: Recipe, manifest: Manifest) -> ModelSpec:
    """Return the model's settings with the vocabulary of the data. Raises MismatchError."""
    wanted, found = recipe.model.vocab_size, manifest.vocab_size
    if wanted and wanted < found:
        raise MismatchError(
            f"model.vocab_size = {wanted:,} is smaller than the {found:,} of the data "
            f"{recipe.data.path}; leave it out to take the data's"
        )
    return recipe.model.replace(vocab_size=wanted or found)


def _find_start(
    recipe: Recipe, manifest: Manifest, comm: "MPI.Intracomm", console: Console, resume: bool
) -> Checkpoint | None:
    """Return the checkpoint from which the run continues; None for its beginning.

    Every rank calls it. Raises UsageError where a new run would overwrite another.
    """
    folder = Path(recipe.train.run)
    if not resume:
        if comm.bcast((folder / METRICS).exists() or (folder / CHECKPOINTS).exists()):
            raise UsageError(
                f"{folder} holds a run already; --resume continues it, or name another train.run"
            )
        return None
    checkpoint = newest_whole(folder, comm, console)
    if checkpoint is None:
        console.say(f"{folder} has no checkpoint yet: starting at step 1")
        return None
    _check_same_run(recipe, manifest, checkpoint)
    return checkpoint


def _check_same_run(recipe: Recipe, manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raise MismatchError unless model, order and data are those of the checkpoint."""
    before, now = dict(checkpoint.facts["recipe"]), recipe.to_dict()
    # Earlier releases wrote fewer keys, such as no `architecture`: their defaults are filled in.
    before["model"] = asdict(read_spec(before["model"]))  # type: ignore[call-overload]
    before["task"] = {"name": task_catalog.DEFAULT, **before.get("task", {})}
    before["optimizer"] = {"name": optimizer_catalog.DEFAULT, **before["optimizer"]}
    kept = {
        "model": now["model"],
        "task": ["name"],
        "optimizer": ["name"],
        "train": ["seed", "batch"],
    }
    changes = [
        f"{section}.{key} was {before[section].get(key)!r} and is {value!r}"
        for section, keys in kept.items()
        for key in keys
        if before[section].get(key) != (value := now[section][key])
    ]
    if checkpoint.facts["data"] != manifest.manifest_hash:
        changes.append(f"the data {recipe.data.path} is another dataset than the run began with")
    if changes:
        raise MismatchError(
            f"--resume needs the same model, order and data, but {'; '.join(changes)}; "
            "correct the recipe, or name another train.run"
        )
