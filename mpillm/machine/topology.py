"""The node by Linux's /sys: CPUs by core, socket and NUMA node, and the CPUs of this job.

A CPU is a hardware thread, in Linux's words. The CPUs of a core share its arithmetic units.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

SYSTEM = Path("sys/devices/system")
ROOT = Path("/")


@dataclass(frozen=True)
class Topology:
    """CPU → its core (named by the core's lowest CPU), socket, NUMA node; empty if unknown."""

    core: Mapping[int, int] = field(default_factory=dict)
    socket: Mapping[int, int] = field(default_factory=dict)
    numa: Mapping[int, int] = field(default_factory=dict)

    def cores(self, cpus: Iterable[int]) -> set[int]:
        """Return the cores of these CPUs; an unknown CPU is a core of its own."""
        return {self.core.get(cpu, cpu) for cpu in cpus}

    def sockets(self, cpus: Iterable[int]) -> set[int]:
        return {self.socket[cpu] for cpu in cpus if cpu in self.socket}

    def numa_nodes(self, cpus: Iterable[int]) -> set[int]:
        return {self.numa[cpu] for cpu in cpus if cpu in self.numa}


def read_topology(root: Path = ROOT) -> Topology:
    """Read the topology of this node; `root` holds `sys`."""
    core, socket = {}, {}
    for folder in (root / SYSTEM / "cpu").glob("cpu[0-9]*"):
        cpu, files = int(folder.name[3:]), folder / "topology"
        siblings = parse_cpus(text_of(files / "thread_siblings_list"))
        if siblings:  # a CPU that is switched off has none
            core[cpu] = min(siblings)
        package = text_of(files / "physical_package_id")
        if package.isdigit():
            socket[cpu] = int(package)
    numa = {
        cpu: int(folder.name[4:])
        for folder in (root / SYSTEM / "node").glob("node[0-9]*")
        for cpu in parse_cpus(text_of(folder / "cpulist"))
    }
    return Topology(core, socket, numa)


def job_cpus(root: Path = ROOT) -> set[int]:
    """Return the CPUs that the node offers to this job or container.

    The mask of this process may be narrower.
    """
    for folder in control_groups(root, "cpuset"):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus"):
            cpus = parse_cpus(text_of(folder / name))
            if cpus:
                return cpus
    return parse_cpus(text_of(root / SYSTEM / "cpu" / "online"))


def cpu_limit(root: Path = ROOT) -> float:
    """Return the CPUs' worth of time of this job or container by its control groups.

    Infinite without a limit. A container may have 2 CPUs of time and 64 in its mask.
    """
    return min((_quota(folder) for folder in control_groups(root, "cpu")), default=math.inf)


def parse_cpus(text: str) -> set[int]:
    """Parse Linux's list of CPUs: `0-3,8` → {0, 1, 2, 3, 8}."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", text)
    return {cpu for first, last in ranges for cpu in range(int(first), int(last or first) + 1)}


def ranges_text(numbers: Iterable[int]) -> str:
    """Write {0, 1, 2, 3, 8} as `0–3,8`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, the innermost first, in version 2 and 1.

    A container often sees its own group as the top folder, and in /proc a path of its host.
    """
    mounts = root / "sys/fs/cgroup"
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops = (mounts, mounts / "unified")
        elif controller in controllers.split(","):
            tops = (mounts / controllers, mounts / controller)
        else:
            continue
        within = Path(path.lstrip("/"))
        yield from (
            top / part
            for top in tops
            for part in (within, *within.parents)
            if (top / part).is_dir()
        )


def _quota(folder: Path) -> float:
    """Read a control group's own limit, in CPUs.

    Version 2 writes `max 100000` or `200000 100000`, version 1 two files.
    """
    quota, period = (text_of(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    text = text_of(folder / "cpu.max") or f"{quota} {period}"
    limit = re.fullmatch(r"(\d+) ([1-9]\d*)", text)
    return int(limit[1]) / int(limit[2]) if limit else math.inf


def text_of(path: Path) -> str:
    """Read a file of /sys or /proc, stripped; "" where it cannot be read.

    A network card that is down refuses to give its speed.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
