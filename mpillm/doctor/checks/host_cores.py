"""Cores: whether each rank of the host has one, and whether threads oversubscribe them."""

import math
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from mpillm.doctor.check_base import Check, HostView
from mpillm.doctor.findings import Finding, Verdict
from mpillm.launch.threads import allowance, threads_setting
from mpillm.machine.topology import Topology, read_topology
from mpillm.system.console import counted

AREA = "host"


@dataclass(frozen=True)
class HostCores:
    """The cores of this host that the ranks of the job may use."""

    ranks: int
    cpus: int
    """Hardware threads that any of the ranks may run on."""
    cores: int
    """The cores of these."""
    allowed: float
    """CPUs' worth of time that control groups and batch system grant to all; may be infinite."""
    all_cores: int
    """Of the host."""
    threads: int | None
    """OMP_NUM_THREADS, None where it is not set."""

    @property
    def usable(self) -> float:
        return min(self.cores, self.allowed)

    @property
    def text(self) -> str:
        """`2 of 64 cores may be used, 4 hardware threads`."""
        text = f"{self.cores} of {self.all_cores} may be used"
        if self.cpus != self.cores:
            text += f", {self.cpus} hardware threads"
        if self.allowed < self.cores:
            time = counted(self.allowed, "CPU")
            text += f", for the time of {time} by the control group or the batch system"
        return text


class CoresCheck(Check):
    name, area = "cores", AREA

    def examine_host(self, host: HostView) -> Iterable[Finding]:
        environment = host.job.environment
        limits = allowance(environment), threads_setting(environment)
        cores = cores_of(host.masks, read_topology(), *limits)
        host.facts["cores"] = str(cores.all_cores)
        return [judge_cores(cores)]


def cores_of(
    masks: Sequence[AbstractSet[int]], topology: Topology, allowed: float, threads: int | None
) -> HostCores:
    """Count the cores; `masks` holds the CPUs that each rank of this host may run on."""
    cpus = set[int]().union(*masks)
    return HostCores(
        len(masks),
        len(cpus),
        len(topology.cores(cpus)),
        allowed,
        len(set(topology.core.values())) or len(cpus),
        threads,
    )


def judge_cores(cores: HostCores) -> Finding:
    """Judge whether the ranks have cores; more than two on a hardware thread are an error."""
    ranks, usable = cores.ranks, cores.usable
    many = f"{counted(ranks, 'rank')} on {counted(usable, 'core')}"
    if ranks > usable:
        most = min(cores.cpus, cores.allowed)
        verdict: Verdict = "error" if ranks > 2 * most else "warning"
        found = f"{many} ({cores.text}): they wait for each other"
        return Finding(AREA, "cores", verdict, found, _more_cores(ranks, usable))
    if cores.threads and cores.threads * ranks > usable:
        found = (
            f"{many}, and OMP_NUM_THREADS={cores.threads}: {cores.threads * ranks} threads "
            f"oversubscribe {counted(usable, 'core')}"
        )
        fair = max(1, int(usable // ranks))
        remedy = f"export OMP_NUM_THREADS={fair}, or unset it: mpillm divides the cores"
        return Finding(AREA, "cores", "warning", found, remedy)
    return Finding(AREA, "cores", "ok", f"{many} ({cores.text})")


def _more_cores(ranks: int, usable: float) -> str:
    return (
        f"ask for a core a rank (sbatch --ntasks={ranks}; PBS ncpus={ranks}), start no more than "
        f"{max(1, math.floor(usable))} here with mpirun -n, or widen a start that binds them to "
        "few cores (mpirun --bind-to none; taskset)"
    )
