"""`mpillm doctor`."""

import os
from dataclasses import dataclass
from typing import ClassVar

from mpillm.doctor.options import DoctorOptions
from mpillm.launch.launchers import is_one_of_several
from mpillm.system.command_line import Debug
from mpillm.system.console import Console
from mpillm.system.standard_streams import refuse_lost_output


@dataclass(frozen=True)
class Doctor(DoctorOptions):
    """Find what would keep a run from starting or make it slow: alone, or under mpirun on every
    host.
    """

    example: ClassVar = "mpirun -n 4 mpillm doctor /scratch/me --json"

    debug: Debug = False

    def run(self) -> None:
        from mpillm.comm.failure import fail_together
        from mpillm.launch.launchers import watched
        from mpillm.system.ending_signals import interrupt_on_signals

        # So that it ends its children and removes its files.
        interrupt_on_signals()
        with fail_together(None, debug=self.debug):
            from mpillm.doctor.diagnose import diagnose

            console = Console(speaks=not is_one_of_several(os.environ), watched=watched(os.environ))
            code = diagnose(self, console, os.environ)
            refuse_lost_output()
            raise SystemExit(code)
