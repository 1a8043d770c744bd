"""A toy check of the doctor: names of at most 3 letters, and whether all ranks answer."""

import os

from mpillm.doctor.check_base import Check
from mpillm.doctor.findings import Finding


class ShortName(Check):
    name, area = "short name", "toys"

    def examine_host(self, host):
        name = os.uname().nodename
        verdict = "ok" if len(name) <= 3 else "warning"
        return [Finding(self.area, self.name, verdict, f"the host is called {name}", "rename it")]

    def examine_ranks(self, world):
        total = world.comm.allreduce(1)
        return [Finding(self.area, "ranks", "ok", f"{total} ranks answered")]
