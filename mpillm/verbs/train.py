"""`mpillm train`."""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from mpillm.errors import UsageError
from mpillm.launch.launchers import detect
from mpillm.system.command_line import Argument, Debug, Option
from mpillm.system.extras import require_packages
from mpillm.system.standard_streams import refuse_lost_output
from mpillm.verbs.job import first_process, limit_torch_threads, open_job

if TYPE_CHECKING:
    from mpillm.system.console import Console
    from mpillm.train.recipe import Recipe as LoadedRecipe

# More nodes, or ranks on one, than any machine has.
MOST, MOST_SEEDS = 1_000_000, 1000
ASSUMED = "this machine was taken for the one host: --nodes N plans for N others, of unknown memory"
Recipe = Annotated[Path, Argument("What to train, on what, and how.", metavar="RECIPE.toml")]
Overrides = Annotated[
    tuple[str, ...],
    Option("Replace a setting of the recipe.", metavar="SECTION.KEY=VALUE", flag="--set"),
]


@dataclass(frozen=True)
class Train:
    """Train a model as a recipe says, the data and the layers shared by the ranks.

    SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2 or SIGURG to any rank, or the end of the job's time:
    the run saves and leaves with exit code 75, and --resume continues it.
    """

    example: ClassVar = (
        "mpirun -n 2 mpillm train jobs/recipes/quickstart.toml --set train.steps=200"
    )
    prints_its_result: ClassVar = False

    recipe: Recipe
    overrides: Overrides = ()
    resume: Annotated[bool, Option("Continue from the newest whole checkpoint.")] = False
    folds: Annotated[
        bool,
        Option("Train on each fold of data.path, which `prepare --folds` made, in RUN/fold-1 …."),
    ] = False
    seeds: Annotated[
        int,
        Option(
            "Train with so many seeds, from train.seed on, in RUN/seed-0 ….",
            minimum=1,
            maximum=MOST_SEEDS,
        ),
    ] = 1
    trace: Annotated[
        bool, Option("Leave RUN/trace.json: when each rank did what, for Perfetto or Chrome.")
    ] = False
    force: Annotated[
        bool, Option("Train although the estimated memory exceeds that of a host.")
    ] = False
    verbose: Annotated[bool, Option("Print where each rank is: host, cores, GPU.")] = False
    dry_run: Annotated[
        bool, Option("Print mesh, bytes and messages, and do nothing; no MPI, no torch.")
    ] = False
    nodes: Annotated[
        int, Option("Nodes of a --dry-run; 0: one, or those of this job.", minimum=0, maximum=MOST)
    ] = 0
    ranks_per_node: Annotated[
        int,
        Option("Ranks on each; 0: as many as the recipe's axes need.", minimum=0, maximum=MOST),
    ] = 0
    as_json: Annotated[bool, Option("Print a --dry-run as JSON.", flag="--json")] = False
    debug: Debug = False

    def run(self) -> None:
        if self.dry_run:
            if self.folds or self.seeds > 1:
                raise UsageError(
                    "--dry-run is of one run, and those of --folds and --seeds are alike; plan one "
                    "with --set data.path=DATA/fold-1"
                )
            self._print_dry_run()
            return
        if self.nodes or self.ranks_per_node or self.as_json:
            raise UsageError(
                "--nodes, --ranks-per-node and --json belong to --dry-run; the launcher says how "
                "many ranks a run has"
            )
        from mpillm.launch.current_job import current_job, foreign_job, job_end
        from mpillm.launch.signals import StopSignals

        # Signals are caught from here on: one that arrives while torch loads stops the run, too.
        begun, signals = time.time(), StopSignals()
        with open_job(self.debug, stops_in_order=True) as job:
            # All of them before the first step: a picture is drawn at the run's end.
            require_packages("mpillm train", "torch", "tensorboard", "matplotlib")
            limit_torch_threads(job.threads)
            from mpillm.comm.failure import on_root
            from mpillm.launch.placement import print_placement
            from mpillm.train.loop import JobLimits
            from mpillm.train.recipe import load_recipe
            from mpillm.train.setup import train

            print_placement(
                job.comm, os.environ, job.threads, job.console, self.verbose, job.node_map
            )
            if foreign := foreign_job(os.environ, socket.gethostname()):
                job.console.warn(foreign)
            limits = JobLimits(
                signals,
                current_job(os.environ),
                job_end(os.environ, begun, job.console.warn),
                begun,
            )
            recipe = load_recipe(self.recipe, self.overrides, job.console.say)

            def train_one(each: "LoadedRecipe") -> None:
                given = self.resume, self.trace, limits, job.node_map, self.force
                train(each, job.comm, job.console, *given)

            if not self.folds and self.seeds == 1:
                train_one(recipe)
                return
            from mpillm.train.folds.fold_runs import plan_runs, train_runs

            runs = on_root(job.comm, lambda: plan_runs(recipe, self.folds, self.seeds))
            given = Path(recipe.train.run), self.resume, job.comm, job.console
            train_runs(runs, train_one, *given)

    def _print_dry_run(self) -> None:
        """Print the layout: on the ranks that a launcher started, or on those that are named."""
        started = detect(os.environ)
        if self.nodes or self.ranks_per_node or (started.size or 1) == 1:
            with first_process(self.debug) as console:
                from mpillm.train.dry_run import Hosts, print_dry_run, ranks_needed

                recipe = self._load(console)
                nodes = self.nodes or 1
                each = self.ranks_per_node or -(-ranks_needed(recipe.parallel) // nodes)
                # What other hosts have is not known here.
                memory = 0 if self.nodes else _memory_here(recipe.train.device)
                hosts = Hosts.numbered(nodes, each, memory, "" if self.nodes else ASSUMED)
                print_dry_run(recipe, hosts, console, self.as_json)
                refuse_lost_output()
            return
        with open_job(self.debug) as job:
            from mpillm.comm.failure import host_name
            from mpillm.train.dry_run import Hosts, print_dry_run

            recipe = self._load(job.console)
            each_memory = job.comm.allgather(_memory_here(recipe.train.device))
            hosts = Hosts.of_job(job.comm.allgather(host_name()), job.node_map, each_memory)
            print_dry_run(recipe, hosts, job.console, self.as_json)

    def _load(self, console: "Console") -> "LoadedRecipe":
        """Load the recipe; nothing but the object is printed with --json."""
        from mpillm.comm.communicator import silent
        from mpillm.train.recipe import load_recipe

        return load_recipe(self.recipe, self.overrides, silent if self.as_json else console.say)


def _memory_here(device: str) -> int:
    """Return what a job may use of this host, in bytes; 0: unknown, or GPUs may hold the model."""
    from mpillm.machine.gpus import visible_gpus
    from mpillm.machine.memory import read_memory

    on_gpus = device == "auto" and visible_gpus(os.environ)
    return 0 if on_gpus else read_memory().limit
