"""`mpillm schedule`."""

import os
import shutil
from dataclasses import dataclass, replace
from typing import ClassVar

from mpillm.launch.launchers import watched
from mpillm.parallel.pipeline.schedule_report import ScheduleOptions, print_schedule
from mpillm.system.command_line import Debug
from mpillm.verbs.job import first_process

MOST_COLUMNS = 2000


@dataclass(frozen=True)
class Schedule(ScheduleOptions):
    """Draw a pipeline schedule, with the time that ranks wait and the memory that they store; no
    MPI, no torch.
    """

    example: ClassVar = "mpillm schedule 1f1b --ranks 4 --microbatches 8 --svg 1f1b.svg"

    debug: Debug = False

    def run(self) -> None:
        with first_process(self.debug) as console:
            # COLUMNS may hold any number.
            width = min(shutil.get_terminal_size((120, 24)).columns, MOST_COLUMNS)
            print_schedule(replace(self, width=width, coloured=watched(os.environ)), console)
