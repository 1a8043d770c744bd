"""`mpillm train`."""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from mpillm.system.command_line import Argument, Debug, Option
from mpillm.system.extras import require_packages
from mpillm.verbs.job import limit_torch_threads, open_job

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
    trace: Annotated[
        bool, Option("Leave RUN/trace.json: when each rank did what, for Perfetto or Chrome.")
    ] = False
    verbose: Annotated[bool, Option("Print where each rank is: host, cores, GPU.")] = False
    debug: Debug = False

    def run(self) -> None:
        from mpillm.launch.current_job import current_job, foreign_job, job_end
        from mpillm.launch.signals import StopSignals

        # Signals are caught from here on: one that arrives while torch loads stops the run, too.
        begun, signals = time.time(), StopSignals()
        with open_job(self.debug, stops_in_order=True) as job:
            # All of them before the first step: a picture is drawn at the run's end.
            require_packages("mpillm train", "torch", "tensorboard", "matplotlib")
            limit_torch_threads(job.threads)
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
            train(
                recipe,
                job.comm,
                job.console,
                self.resume,
                self.trace,
                limits,
                job.node_map,
            )
