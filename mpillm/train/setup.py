"""Set up a run from its recipe: mesh, plan, model, checkpoint; then train."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.comm.failure import on_root
from mpillm.comm.mesh import Mesh
from mpillm.errors import DataError, LayoutError, RecipeError
from mpillm.infer.loading import (
    RunConstants,
    missing_data,
    open_of,
    read_vocabulary,
)
from mpillm.infer.model_source import BASE
from mpillm.infer.references import find_references
from mpillm.infer.task_checks import check_task
from mpillm.machine.cluster_profile import Cluster, ClusterProfile, describe_cluster, load_profile
from mpillm.machine.memory import read_memory
from mpillm.machine.node_map import NodeMap, map_nodes
from mpillm.models.adapt import tuned_shapes
from mpillm.models.part_module import torch_explained
from mpillm.models.tuning import PROJECTIONS
from mpillm.parallel.devices import may_take_gpus
from mpillm.parallel.step_plan import StepPlan, make_mesh
from mpillm.plan.memory_table import beyond_all_hosts
from mpillm.plan.rank_loads import axis_traffic
from mpillm.plan.slow_tensor import slow_tensor_text
from mpillm.runs.folder import HISTORY
from mpillm.runs.history import STARTED, read_history
from mpillm.system.compile_cache import find_compiler, set_compile_cache
from mpillm.system.console import Console, once_each
from mpillm.system.malloc import keep_pages
from mpillm.tasks.answer_rewards.reward_catalog import make_rewards
from mpillm.tasks.metrics.metric import CLASSES
from mpillm.tasks.metrics.metric_catalog import make_metrics
from mpillm.tasks.task import Task
from mpillm.tasks.task_catalog import make_task
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.manifest import NAME, Manifest
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.samples import RowShape, SampleReader
from mpillm.train.best_checkpoint import BestCheckpoint
from mpillm.train.find_teacher import TeacherSource, find_teacher
from mpillm.train.hardware import Hardware, choose_hardware
from mpillm.train.hold import locked_run
from mpillm.train.loop import JobLimits, TrainingLoop
from mpillm.train.optimizers.optimizer import check_rules
from mpillm.train.print_plan import print_plan
from mpillm.train.recipe import Recipe
from mpillm.train.resuming import find_start, say_changes
from mpillm.train.rollouts.reference_model import REFERENCE, open_reference
from mpillm.train.rollouts.rollout_checks import check_rollouts
from mpillm.train.rollouts.rollouts import Rollouts
from mpillm.train.run_memory import RunMemory
from mpillm.train.run_plan import (
    as_read,
    fill_model,
    plan_run,
    plan_teacher,
    profile_path,
    row_lengths,
)
from mpillm.train.start_from import restore_base, start_from
from mpillm.train.step import Trainer
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.model_settings import model_settings

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
    force: bool = False,
) -> None:
    """Train as the recipe says. Every rank calls it.

    `resume`: continue from the newest whole checkpoint of the run, if it has any. `trace`: write a
    file that shows when each rank computed. `node_map`: of `comm`; None asks MPI for it. `force`:
    train although the estimated memory exceeds that of a host. Raises subclasses of MpillmError.
    """
    keep_pages()
    manifest = _load_manifest(recipe)
    task, recipe = _with_task(recipe, manifest, comm)
    recipe = on_root(comm, lambda: _with_new_head(recipe))
    node_map = node_map or map_nodes(comm)
    # GPUs hold the weights of a run that takes them. Their memory is found out by its allocation.
    hosts_compute = comm.bcast(not may_take_gpus(recipe.train.device))
    # Hosts may have more memory than others: that of each node's first rank.
    limit = comm.allgather(read_memory().limit)
    there = [limit[ranks[0]] for ranks in node_map.nodes]
    if fault := beyond_all_hosts(recipe.model, recipe.train.batch, there, hosts_compute):
        raise LayoutError(fault)
    # With the tokenizer, which every checkpoint holds: a damaged one is found before any step.
    constants = RunConstants.read(manifest, recipe.to_dict(), comm)
    settings, parallel = recipe.train, recipe.parallel
    mesh = make_mesh(comm, parallel, recipe.model, settings.batch, node_map)
    teacher = find_teacher(recipe, task, manifest, comm, console)
    plan = _plan(recipe, task, mesh, teacher)
    if parallel.context > 1:
        _check_context(recipe, task)
    _check_groups(recipe)
    _check_packing(recipe, task)
    _check_reference(recipe, task)
    _check_rollouts(recipe, task, mesh)
    with open_of(manifest, "train") as reader:
        # Before the run has a folder: a dataset shorter than one context, or a missing profile,
        # must leave nothing to clean up.
        documents = recipe.data.numbers_documents(task)
        row = RowShape.of(task, row_lengths(recipe, plan), documents)
        reader.steps(row, settings.batch, settings.seed)
        cluster = describe_cluster(comm, node_map)
        profile = _profile(recipe, comm, console, cluster)
        _warn(recipe, console)
        folder = Path(settings.run)
        with locked_run(folder, comm, limits.job) as hold, torch_explained():
            checkpoint = find_start(recipe, manifest, comm, console, resume)
            recorded = checkpoint.facts["recipe"]["train"] if checkpoint else {}
            hardware = choose_hardware(settings, recorded, comm, node_map, console)
            _check_shards(recipe, hardware)
            recipe = resolved(recipe, hardware)
            plan = replace(
                plan, precision=hardware.precision, compiled=_compiles(recipe, task, comm, console)
            )
            constants = constants.of_recipe(recipe.to_dict())
            if checkpoint is not None:
                say_changes(recipe, checkpoint, console)
            memory = RunMemory.of(as_read(recipe, plan, reader), mesh)
            memory = memory.with_reference(plan, task.writes_answers)
            estimate = memory.predict(plan)
            short = on_root(comm, partial(memory.check_hosts, plan, there, force))
            data_text = _describe_data(recipe, task, reader, row, comm, console)
            print_plan(recipe, mesh, plan, data_text, console, hardware.description, estimate)
            for text in filter(None, (short, _slow_tensor(recipe, mesh, plan, profile))):
                console.warn(text)
            warn = once_each(console.warn)
            trainer = Trainer(recipe, task, reader, mesh, plan, profile, warn)
            if mesh.axis("data").size * parallel.context > 1:
                console.say(f"gradients: {trainer.model.gradients.describe()}")
            if plan.schedule.ranks > 1:
                console.say(f"stages: {trainer.describe_pipeline()}")
            facts = _begin_weights(recipe, trainer, teacher, checkpoint, manifest, console)
            constants = constants.with_facts(facts)
            if task.needs_reference:
                given = trainer.model, manifest, folder
                trainer.references = find_references(*given, checkpoint is None, comm, console)
                trainer.references.give(reader)
            constants = _begin_rollouts(
                recipe, trainer, checkpoint, manifest, reader, constants, console
            )
            loop = TrainingLoop(
                recipe, manifest, constants, trainer, console, trace, limits, cluster, hold, memory
            )
            loop.run(checkpoint)
            trainer.close()


def _plan(recipe: Recipe, task: Task, mesh: Mesh, teacher: TeacherSource | None) -> StepPlan:
    """Plan the step. Raises subclasses of MpillmError for what cannot be."""
    plan = plan_run(recipe, mesh.sizes)
    if teacher is None:
        return plan
    documents = recipe.data.numbers_documents(task)
    return plan_teacher(recipe, documents, plan, teacher.model.spec, mesh.sizes)


def _begin_weights(
    recipe: Recipe,
    trainer: Trainer,
    teacher: TeacherSource | None,
    checkpoint: Checkpoint | None,
    manifest: Manifest,
    console: Console,
) -> Mapping[str, Any]:
    """Take the weights of other models; return the facts that name the base of adapters and the
    teacher.
    """
    base = _start(recipe, trainer, checkpoint, manifest, console)
    facts = {BASE: base} if base else {}
    if teacher is not None:
        facts |= teacher.fill(trainer.model, checkpoint, console.warn)
    return facts


def _start(
    recipe: Recipe,
    trainer: Trainer,
    checkpoint: Checkpoint | None,
    manifest: Manifest,
    console: Console,
) -> Mapping[str, Any]:
    """Take the weights of `train.start_from`; return the fact that names the base of adapters."""
    if not recipe.train.start_from:
        return {}
    place, comm, frozen = Path(recipe.train.start_from), trainer.mesh.comm, trainer.model.frozen
    if checkpoint is None:
        held = {
            name: trainer.held(name, each)
            for name, each in trainer.stepped.items()
            if not name.startswith(PROJECTIONS)
        }
        given = recipe.model, held, manifest, comm, console, frozen, recipe.tuning
        base = start_from(place, *given)
        trainer.model.filled()
        return base
    if not recipe.adapter.used:
        return {}
    return restore_base(place, checkpoint, recipe.model, frozen, comm, console)


def _describe_data(
    recipe: Recipe,
    task: Task,
    reader: SampleReader,
    row: RowShape,
    comm: "MPI.Intracomm",
    console: Console,
) -> str:
    """Say what the run reads, and warn of what is cut off. Every rank calls it."""
    samples = recipe.train.steps * recipe.train.batch
    if task.writes_answers:
        assert isinstance(reader, PairReader)
        group = recipe.task.group
        times = samples / group / reader.n_pairs
        return f"{reader.n_pairs:,} prompts, read {times:.2f} times, {group} answers each time"
    if cuts := on_root(comm, lambda: reader.describe_cuts(row)):
        console.warn(cuts)
    return reader.describe(row, samples)


def _begin_rollouts(
    recipe: Recipe,
    trainer: Trainer,
    checkpoint: Checkpoint | None,
    manifest: Manifest,
    reader: SampleReader,
    constants: RunConstants,
    console: Console,
) -> RunConstants:
    """Let the trainer of a task that writes answers do so; return the constants with the reference
    that it has.
    """
    if not trainer.task.writes_answers:
        return constants
    assert isinstance(reader, PairReader)
    model, comm, reference = trainer.model, trainer.mesh.comm, None
    if recipe.task.kl:
        given = recipe, checkpoint, model.device, comm, console
        reference, fact = open_reference(*given)
        constants = constants.with_facts({REFERENCE: fact})
    rewards = make_rewards(recipe.task)
    trainer.rollouts = Rollouts(recipe, model, manifest, reader, rewards, reference)
    return constants


def resolved(recipe: Recipe, hardware: Hardware) -> Recipe:
    """Return the recipe with the chosen device and dtype, which a resumed run keeps."""
    chosen: dict[str, Any] = {
        "device": hardware.precision.device,
        "dtype": hardware.precision.dtype,
    }
    return replace(recipe, train=replace(recipe.train, **chosen))


def _load_manifest(recipe: Recipe) -> Manifest:
    """Load the dataset's manifest. Raises DataError; where the run was trained in another folder,
    it says which.
    """
    path = Path(recipe.data.path)
    if not (path / NAME).is_file():
        starts = [
            event.facts.get("folder")
            for event in read_history(Path(recipe.train.run) / HISTORY)
            if event.name == STARTED
        ]
        if starts and starts[-1]:
            missing = missing_data(path, starts[-1], "--set data.path=FOLDER")
            raise DataError(f"the run's dataset {missing}")
    return Manifest.load(path)


def _warn(recipe: Recipe, console: Console) -> None:
    """Warn of settings that cannot be meant."""
    settings, steps = recipe.optimizer, recipe.train.steps
    warmup, first = settings.warmup_steps, settings.warmup_steps + settings.period
    if warmup >= steps:
        console.warn(
            f"optimizer.warmup_steps = {warmup:,} and train.steps = {steps:,}: the whole run is "
            "warm-up, and the learning rate never falls; set fewer warm-up steps"
        )
    elif settings.schedule == "cosine-restarts" and first >= steps:
        console.warn(
            f"the first cycle of cosine-restarts ends at step {first:,} and train.steps = "
            f"{steps:,}: the run has no restart; set a shorter optimizer.period"
        )
    islands = recipe.parallel
    if islands.island > 1 and islands.island_from >= steps:
        console.warn(
            f"parallel.island_from = {islands.island_from:,} and train.steps = {steps:,}: the "
            "islands train as one data axis to the end; set fewer steps before the first round"
        )


def _slow_tensor(recipe: Recipe, mesh: Mesh, plan: StepPlan, profile: ClusterProfile | None) -> str:
    """Return a warning where the tensor axis is on several hosts; "" else."""
    if mesh.find("tensor") is None:
        return ""
    parallel, batch = recipe.parallel, recipe.train.batch
    traffic = axis_traffic(recipe.model, plan, batch, mesh.sizes, mesh.node_map, parallel)
    return slow_tensor_text(recipe.model, plan, batch, parallel, mesh.node_map, traffic, profile)


def _compiles(recipe: Recipe, task: Task, comm: "MPI.Intracomm", console: Console) -> bool:
    """Return whether the layers are compiled. Raises RecipeError where they cannot be, with the
    reason. Every rank calls it.
    """
    if not recipe.train.compile:
        return False
    if "documents" in task.field_names:
        raise RecipeError(
            "train.compile = true needs the same computation in every step, and the task "
            f"{task.name} keeps answers apart, which cuts each batch otherwise; leave it out"
        )
    if recipe.data.numbers_documents(task):
        way_out = "set data.pack = false" if task.packs else "leave one of them out"
        name = "pack" if task.packs else "document_mask"
        raise RecipeError(
            "train.compile = true needs the same computation in every step, and "
            f"data.{name} = true cuts each batch otherwise; {way_out}"
        )
    if recipe.train.recompute == "attention":
        raise RecipeError(
            'train.compile = true compiles a layer as a whole, and train.recompute = "attention" '
            'computes a part of it again; take recompute = "full", or leave one of them out'
        )
    if recipe.train.device == "cpu" and not all(comm.allgather(bool(find_compiler()))):
        raise RecipeError(
            "train.compile = true needs a C++ compiler on each host, and there is no g++, clang++ "
            "or c++ on PATH; load its module, name one by CXX, or leave compile out"
        )
    console.say(f"compiling the layers; torch keeps their code in {set_compile_cache()}")
    return True


def _check_context(recipe: Recipe, task: Task) -> None:
    """Raise RecipeError for what needs whole sequences on a rank, where ranks share them."""
    given = f"parallel.context = {recipe.parallel.context}"
    wanted = make_metrics(task.metrics, task.classes)
    if whole := [m.name for m in wanted if not (m.needs_totals_alone or m.sums_positions)]:
        raise RecipeError(
            f"{given} evaluates positions on several ranks, and the metric {whole[0]} needs whole "
            "sequences; leave parallel.context out, or take another task"
        )
    if not task.sums_positions:
        raise RecipeError(
            f"{given} computes the loss of positions on several ranks, and that of the task "
            f"{recipe.task.name} is no sum over positions; leave parallel.context out"
        )


def _check_packing(recipe: Recipe, task: Task) -> None:
    """Raise RecipeError where conversations would share rows of a model that reads across them."""
    reads = "documents" in recipe.model.shared_inputs
    if "documents" in task.field_names and not reads:
        raise RecipeError(
            f"the task {task.name} keeps answers apart by documents, which the architecture "
            f"{recipe.model.architecture} does not read; take another one"
        )
    if recipe.data.numbers_documents(task) and not reads:
        raise RecipeError(
            f"data.pack = true keeps conversations apart by documents, which the architecture "
            f"{recipe.model.architecture} does not read; set data.pack = false"
        )


def _check_reference(recipe: Recipe, task: Task) -> None:
    """Raise RecipeError where a task that compares with a model at the start has none."""
    if task.needs_reference and not recipe.train.start_from:
        raise RecipeError(
            f"the task {task.name} compares answers with those of the weights at the start, and "
            "train.start_from names none; name the run of an instruction tuning, such as "
            "--set train.start_from=runs/chat"
        )


def _check_rollouts(recipe: Recipe, task: Task, mesh: Mesh) -> None:
    """Raise RecipeError, LayoutError or UsageError for what no run that writes answers has."""
    if task.writes_answers:
        check_rollouts(recipe, mesh.sizes)
        # A reward of the user's own is imported before the run has a folder.
        make_rewards(recipe.task)


def _check_shards(recipe: Recipe, hardware: Hardware) -> None:
    """Raise LayoutError where no layout keeps the bits of the norm."""
    if recipe.parallel.zero and recipe.train.fixed_order and hardware.precision.device == "cuda":
        raise LayoutError(
            f"train.fixed_order adds up the norm of whole gradients on GPUs, and parallel.zero = "
            f"{recipe.parallel.zero} shares them out; leave one of them out"
        )


def _check_groups(recipe: Recipe) -> None:
    """Raise RecipeError for names that match no weight of the whole model: of groups of the
    optimizer, of adapters, of frozen weights.
    """
    rules, tuning = recipe.optimizer.groups, recipe.tuning
    if rules or tuning.freezes:
        with torch_explained():
            trained = tuned_shapes(recipe.model, tuning).trained
            check_rules(rules, trained, recipe.model.tied_weights)


def _with_new_head(recipe: Recipe) -> Recipe:
    """Let a run of adapters train the weights of a head that its base lacks."""
    if not (recipe.adapter.used and recipe.train.start_from):
        return recipe
    new = recipe.model.new_weights(model_settings(Path(recipe.train.start_from)))
    also = dict.fromkeys([*recipe.adapter.also, *(f"{name}*" for name in new)])
    return replace(recipe, adapter=replace(recipe.adapter, also=tuple(also)))


def _profile(
    recipe: Recipe, comm: "MPI.Intracomm", console: Console, here: Cluster
) -> ClusterProfile | None:
    """Load the cluster's profile: the one the recipe names, else the one in the run's folder.

    Returns None without either. Every rank calls it.
    """

    def load() -> ClusterProfile | None:
        path = profile_path(recipe)
        return load_profile(path, console.warn, here, aid=True) if path else None

    return on_root(comm, load)


def _with_task(recipe: Recipe, manifest: Manifest, comm: "MPI.Intracomm") -> tuple[Task, Recipe]:
    """Make the task, and fill the model's settings that follow from the data. Every rank calls it.

    Raises MismatchError where data, task and model do not fit, or the recipe sets one lower than
    the data needs.
    """
    vocabulary = read_vocabulary(manifest, comm)
    task = make_task(recipe.task.name, recipe.task, vocabulary, Lengths.of(recipe.model))
    check_task(task, recipe.model, manifest)
    # Made again by the loop: here a wrong name is found before the run has a folder.
    BestCheckpoint(recipe.train, task, bool(manifest.splits["validation"].n_tokens))
    if len(task.classes) == 1 and task.output_kind in CLASSES:
        raise RecipeError(
            f"all labels of the data {manifest.folder} are {task.classes[0]!r}, and one class "
            "alone cannot be learnt; prepare data with two classes or more"
        )
    return task, fill_model(recipe, task.model_settings(vocabulary))
