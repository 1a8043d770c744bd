"""`mpillm doctor`."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from mpillm.doctor.options import DoctorOptions
from mpillm.launch.ranks import rank_from_environment
from mpillm.system.command_line import Debug
from mpillm.system.console import Console


def _late(module: str, name: str) -> Callable[..., Any]:
    return lambda *given: getattr(importlib.import_module(module), name)(*given)


@dataclass(frozen=True)
class Doctor(DoctorOptions):
    """Find what would keep a run from starting or make it slow: alone, or under mpirun on every
    host.
    """

    example: ClassVar = "mpirun -n 4 mpillm doctor /scratch/me --json"

    debug: Debug = False

    def run(self) -> None:
        from mpillm.comm.failure import fail_together
        from mpillm.launch.terminal import watched

        with fail_together(None, debug=self.debug):
            from mpillm.doctor.diagnose import doctor
            from mpillm.doctor.options import Probes

            probes = Probes(
                gpu_probe=_late("mpillm.comm.gpu.probe", "probe"),
                describe_cluster=_late("mpillm.machine.cluster_profile", "describe_cluster"),
                load_profile=_late("mpillm.machine.cluster_profile", "load_profile"),
            )
            console = Console(
                speaks=rank_from_environment(os.environ) == 0, watched=watched(os.environ)
            )
            raise SystemExit(doctor(self, console, probes, os.environ))
