"""A toy verb: adds up a number over all ranks."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from mpillm.system.command_line import Debug, Option
from mpillm.verbs.job import open_job


@dataclass(frozen=True)
class AddUp:
    """Add a number up over all ranks."""

    example: ClassVar = "mpirun -n 2 mpillm growth.toy_verb:AddUp --number 3"

    number: Annotated[int, Option("What each rank brings.")] = 1
    debug: Debug = False

    def run(self) -> None:
        with open_job(self.debug) as job:
            job.console.say(f"the sum is {job.comm.allreduce(self.number)}")
