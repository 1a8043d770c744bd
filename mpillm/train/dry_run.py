"""Print a run's layout without training: mesh, bytes, messages, schedule; no torch, no MPI."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.errors import DataError, LayoutError, UsageError
from mpillm.machine.cluster_profile import ClusterProfile, load_profile
from mpillm.machine.node_map import NodeMap
from mpillm.parallel.axis_sizes import AXES
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import Precision, StepPlan, mesh_order
from mpillm.plan.memory_table import TITLE, MemoryTable, beyond_all_hosts
from mpillm.plan.rank_loads import AxisTraffic, RankLoad, axis_traffic
from mpillm.plan.slow_tensor import slow_tensor_text
from mpillm.system.console import Console, binary_bytes, counted
from mpillm.system.extras import installed
from mpillm.system.json_text import to_json
from mpillm.tasks.task_catalog import make_task, task_class
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.manifest import NAME, Manifest
from mpillm.tokens.pairs.pair_manifest import PairManifest
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.train.print_plan import expert_facts, pipeline_facts, teacher_facts
from mpillm.train.recipe import Recipe, TrainSettings
from mpillm.train.rollouts.rollout_checks import check_rollouts
from mpillm.train.run_memory import RunMemory
from mpillm.train.run_plan import as_read, fill_model, plan_run, plan_teacher, profile_path

if TYPE_CHECKING:
    from mpillm.tasks.task import Task

# A mesh of more ranks is printed host by host; of more hosts, the first and the last ones.
SHOWN_RANKS, SHOWN_HOSTS = 64, 16
# A row of Python objects a rank: a million take some seconds.
MOST_RANKS = 1_000_000


@dataclass(frozen=True)
class Hosts:
    """Where the ranks are: the nodes' names, and the ranks of each, in the order of the mesh."""

    names: tuple[str, ...]
    node_map: NodeMap
    memory: tuple[int, ...]
    """What the job may use of each host, in bytes; 0: unknown, as of hosts that are not here."""
    assumed: str = ""
    """What was taken for the hosts where nobody named any, and the way to name them."""

    @classmethod
    def numbered(
        cls, nodes: int, ranks_per_node: int, memory: int = 0, assumed: str = ""
    ) -> "Hosts":
        """Make `nodes` hosts without names, each of `memory`. Raises UsageError where they have too
        many ranks.
        """
        if nodes * ranks_per_node > MOST_RANKS:
            raise UsageError(
                f"--nodes {nodes:,} × --ranks-per-node {ranks_per_node:,} are more than the "
                f"{MOST_RANKS:,} ranks of a dry run; take fewer"
            )
        firsts = range(0, nodes * ranks_per_node, ranks_per_node)
        ranks = tuple(tuple(range(first, first + ranks_per_node)) for first in firsts)
        names = tuple(f"host {number}" for number in range(nodes))
        return cls(names, NodeMap(ranks), (memory,) * nodes, assumed)

    @classmethod
    def of_job(
        cls, names: Sequence[str], node_map: NodeMap, memory: Sequence[int] | None = None
    ) -> "Hosts":
        """Take the hosts of a job; `names`, `memory`: of each rank's host. Ranks are ordered by
        host.
        """
        firsts = [ranks[0] for ranks in node_map.nodes]
        ordered = node_map.of_ranks(node_map.host_order)
        there = tuple(memory[first] if memory else 0 for first in firsts)
        return cls(tuple(names[first] for first in firsts), ordered, there)


def ranks_needed(settings: ParallelSettings) -> int:
    """Return the product of the axes whose size the recipe gives."""
    return math.prod(axis.wanted(settings) or 1 for axis in AXES)


def print_dry_run(recipe: Recipe, hosts: Hosts, console: Console, as_json: bool) -> None:
    """Print the layout of `recipe` on `hosts`. Raises what the run would raise of the layout."""
    recipe, task, notes = _with_data(recipe)
    settings, model = recipe.train, recipe.model
    on_cpus = settings.device != "cuda"
    if fault := beyond_all_hosts(model, settings.batch, hosts.memory, on_cpus):
        # A note alone would not do: the plan of a model without bounds has no end.
        raise LayoutError("; ".join(filter(None, (fault, hosts.assumed))))
    sizes = mesh_order(recipe.parallel, hosts.node_map.size, model, settings.batch)
    plan, more = _with_teacher(recipe, task, plan_run(recipe, sizes), sizes)
    notes += more
    writes = installed("torch") and task_class(recipe.task.name).writes_answers
    if writes:
        check_rollouts(recipe, sizes)
    precision, more = planned_precision(settings)
    plan, notes = replace(plan, precision=precision), [*notes, *more]
    memory = RunMemory(_as_read(recipe, plan), sizes, hosts.node_map)
    memory = memory.with_reference(plan, writes)
    table = memory.table(plan)
    host = table.shortest(hosts.memory)
    if host is not None:
        said = f"{table.excess(hosts.memory)}: the run is refused without --force"
        remedy = memory.host_remedy(plan, host)
        notes.append("; ".join(filter(None, (said, remedy, hosts.assumed))))
    traffic = axis_traffic(model, plan, settings.batch, sizes, hosts.node_map, recipe.parallel)
    notes += _slow_tensor(recipe, plan, hosts.node_map, traffic)
    if as_json:
        console.write(to_json(_table(recipe, hosts, plan, table, traffic, notes)) + "\n")
        return
    console.facts("dry run", _facts(recipe, hosts, plan, sizes))
    _print_ranks(hosts, table.loads, console)
    console.table(TITLE, table.columns, table.rows)
    _print_traffic(traffic, hosts, console)
    for note in notes:
        console.say(note)


def _as_read(recipe: Recipe, plan: StepPlan) -> Recipe:
    """Take the lengths of the data's rows, where the data are here."""
    folder = Path(recipe.data.path)
    if not (folder / NAME).is_file():
        return recipe
    manifest = Manifest.load(folder)
    if not isinstance(manifest, PairManifest):
        return recipe
    # A login node may have the manifest alone, or not all shards.
    with suppress(DataError), PairReader(manifest, "train") as reader:
        return as_read(recipe, plan, reader)
    return recipe


def _slow_tensor(
    recipe: Recipe, plan: StepPlan, node_map: NodeMap, traffic: Mapping[str, AxisTraffic]
) -> list[str]:
    """Return notes of a tensor axis on several hosts. The profile may be of another cluster."""
    notes: list[str] = []

    def text(profile: ClusterProfile | None) -> str:
        batch, settings = recipe.train.batch, recipe.parallel
        return slow_tensor_text(recipe.model, plan, batch, settings, node_map, traffic, profile)

    if not text(None):
        return []
    path = profile_path(recipe)
    profile = None
    if path and path.exists():
        profile = load_profile(path, notes.append, here=None, aid=True)
    elif path:
        notes.append(f"the profile {path} is not here")
    return [*notes, text(profile)]


def _with_teacher(
    recipe: Recipe, task: "Task | None", plan: StepPlan, sizes: Mapping[str, int]
) -> tuple[StepPlan, list[str]]:
    """Plan the teacher; return notes of what is not known. Raises what the run would raise of it.

    `task`: None where it is not known.
    """
    place = recipe.distillation.teacher
    if not place:
        return plan, []
    if not installed("torch"):
        return plan, [f"torch is not installed here: the teacher {place} is not counted"]
    # Imported here: they load torch.
    from mpillm.train.find_teacher import check_distils, teacher_settings

    if task is not None:
        check_distils(recipe, task)
    documents = task is not None and recipe.data.numbers_documents(task)
    return plan_teacher(recipe, documents, plan, teacher_settings(recipe), sizes), []


def _with_data(recipe: Recipe) -> tuple[Recipe, "Task | None", list[str]]:
    """Fill the settings of the model that follow from the data, as far as they can be known.

    Returns the task, where torch is installed, and notes of what is assumed. A recipe that names
    them needs no dataset. Raises DataError without either.
    """
    folder, model, task = Path(recipe.data.path), recipe.model, recipe.task
    if not (folder / NAME).is_file() and model.vocab_size:
        return (
            recipe,
            None,
            [f"{folder} is not here: model.vocab_size is taken as the recipe has it"],
        )
    manifest = Manifest.load(folder)
    if installed("torch"):
        vocabulary = replace(manifest.load_tokenizer().vocabulary, classes=manifest.classes)
        made = make_task(task.name, task, vocabulary, Lengths.of(model))
        # Imported here: it loads torch.
        from mpillm.infer.task_checks import check_task

        check_task(made, model, manifest)
        return fill_model(recipe, made.model_settings(vocabulary)), made, []
    found = {"vocab_size": manifest.vocab_size, "classes": len(manifest.classes)}
    found = {name: count for name, count in found.items() if count and hasattr(model, name)}
    note = (
        "torch is not installed here: tokens that the task adds to the vocabulary are not counted, "
        "nor the reference of a task that writes answers"
    )
    return fill_model(recipe, found), None, [note]


def planned_precision(settings: TrainSettings) -> tuple[Precision, list[str]]:
    """Return the device and the dtypes as far as the recipe has them.

    Notes say what only the run finds out.
    """
    notes, dtype = [], settings.dtype
    device = "cuda" if settings.device == "cuda" else "cpu"
    if settings.device == "auto":
        notes.append("train.device = auto: planned for CPUs; the run takes GPUs where it has them")
    if dtype == "auto" or (dtype == "default" and device == "cuda"):
        notes.append("train.dtype = auto: planned for bfloat16; the run times a product of each")
        dtype = "bfloat16"
    found = "float32" if dtype == "default" else dtype
    return Precision(device, found, settings.reduce_dtype), notes


def _facts(
    recipe: Recipe, hosts: Hosts, plan: StepPlan, sizes: Mapping[str, int]
) -> dict[str, str]:
    model, train = recipe.model, recipe.train
    mesh = " × ".join(f"{axis}={size}" for axis, size in sizes.items())
    ranks = counted(hosts.node_map.size, "rank")
    return {
        "model": model.describe(),
        "parameters": f"{model.parameters:,}",
        **teacher_facts(recipe, plan),
        "tokens a step": f"{train.batch * model.context:,} = {train.batch} sequences × "
        f"{model.context}",
        "mesh": f"{mesh} on {ranks}, {counted(len(hosts.names), 'host')}",
        "a rank's batch": f"{counted(plan.rows, 'sequence')}, {plan.microbatch} at once, "
        f"{plan.microbatches} microbatch(es)",
        "device": f"{plan.precision.device}, {plan.precision.dtype}",
        **pipeline_facts(plan),
        **expert_facts(recipe),
        "optimizer": recipe.optimizer.describe(),
    }


def _print_ranks(hosts: Hosts, loads: Sequence[RankLoad], console: Console) -> None:
    axes = list(loads[0].places)
    columns = ["host", "ranks", *axes, "layers", "parameters", "bytes"]
    groups: list[list[RankLoad]] = [[load] for load in loads]
    if len(loads) > SHOWN_RANKS:
        groups = [[loads[rank] for rank in ranks] for ranks in hosts.node_map.nodes]
    rows = [_row(hosts, group, axes) for group in groups]
    if len(loads) > SHOWN_RANKS and len(rows) > SHOWN_HOSTS:
        half = SHOWN_HOSTS // 2
        rows = [*rows[:half], ["…"] * len(columns), *rows[-half:]]
    console.table("ranks", columns, rows)


def _row(hosts: Hosts, group: Sequence[RankLoad], axes: Sequence[str]) -> list[str]:
    """Write the ranks of a group, which share a host: numbers as ranges, loads of the largest."""
    layers = [_layers(load) for load in group]
    return [
        hosts.names[group[0].node],
        _ranges(load.rank for load in group),
        *(_ranges(load.places[axis] for load in group) for axis in axes),
        " / ".join(dict.fromkeys(layers)) if len(set(layers)) <= 4 else "…",
        f"{max(load.parameters for load in group):,}",
        binary_bytes(max(load.memory.total for load in group)),
    ]


def _layers(load: RankLoad) -> str:
    return ", ".join(_ranges(range(part.first, part.last)) for part in load.parts)


def _ranges(numbers: Iterable[int]) -> str:
    """Write 0, 1, 2, 5 as `0–2, 5`."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}–{b}" if a < b else f"{a}" for a, b in found)


def _print_traffic(traffic: Mapping[str, AxisTraffic], hosts: Hosts, console: Console) -> None:
    ranks = hosts.node_map.size
    rows = [
        [
            axis,
            f"{found.size}",
            binary_bytes(found.rank_bytes),
            binary_bytes(found.rank_bytes * ranks),
            "-" if found.size == 1 else counted(found.nodes, "host"),
        ]
        for axis, found in traffic.items()
    ]
    columns = ["axis", "ranks", "a rank sends", "all ranks", "a group is on"]
    console.table("messages a step", columns, rows)


def _table(
    recipe: Recipe,
    hosts: Hosts,
    plan: StepPlan,
    memory: MemoryTable,
    traffic: Mapping[str, AxisTraffic],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Build what `--json` prints."""
    schedule = plan.schedule
    # GPUs have memory of their own, which only the run finds out.
    compared = plan.precision.device == "cpu" and all(hosts.memory)
    return {
        "model": {"parameters": recipe.model.parameters, "blocks": recipe.model.blocks},
        "mesh": {axis: found.size for axis, found in traffic.items()},
        "step": {
            "sequences": recipe.train.batch,
            "tokens": recipe.train.batch * recipe.model.context,
            "rank_sequences": plan.rows,
            "microbatch": plan.microbatch,
            "microbatches": plan.microbatches,
            "device": plan.precision.device,
            "dtype": plan.precision.dtype,
            "schedule": schedule.name if schedule.ranks > 1 else None,
            "stages": schedule.stages,
            "bubble": plan.timeline.bubble,
        },
        "hosts": [
            {
                "host": name,
                "parameters": node.parameters,
                "bytes": node.kinds,
                "total_bytes": node.total,
            }
            for name, node in zip(hosts.names, memory.nodes, strict=True)
        ],
        "ranks": [
            {
                "rank": load.rank,
                "host": hosts.names[load.node],
                **load.places,
                "layers": [[part.first, part.last] for part in load.parts],
                "parameters": load.parameters,
                "bytes": {kind: found.rank for kind, found in load.memory.by_kind.items()},
                "total_bytes": load.memory.total,
            }
            for load in memory.loads
        ],
        "host_memory_bytes": min(hosts.memory) if compared else None,
        "fits": memory.shortest(hosts.memory) is None if compared else None,
        "messages": {
            axis: {
                "rank_bytes": round(found.rank_bytes),
                "all_bytes": round(found.rank_bytes * len(memory.loads)),
                "hosts": found.nodes,
            }
            for axis, found in traffic.items()
        },
        "notes": list(notes),
    }
