"""`mpillm status`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from mpillm.system.command_line import Argument, Debug, Json
from mpillm.verbs.job import first_process


@dataclass(frozen=True)
class Status:
    """Show a run's state: its last step, speed, time left, checkpoint and job; no MPI, no torch."""

    example: ClassVar = "mpillm status runs/quickstart"

    folder: Annotated[Path, Argument("A run's folder.", metavar="RUN")]
    as_json: Json = False
    debug: Debug = False

    def run(self) -> None:
        with first_process(self.debug) as console:
            from mpillm.launch.schedulers.scheduler_catalog import job_state
            from mpillm.runs.status import print_status

            print_status(
                self.folder,
                console,
                self.as_json,
                lambda scheduler, job: job_state(scheduler, job, os.environ) or "",
            )
