"""A host: cores, memory, shared memory, limits; and whether the ranks on it fit."""

import math
import platform
import re
import resource
import shutil
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from mpillm.doctor.findings import Finding, Verdict
from mpillm.machine.topology import Topology, control_groups, text_of
from mpillm.system.console import binary_bytes, counted

AREA = "host"
MIB = 1 << 20
SHARED_MEMORY = Path("/dev/shm")
# Containers are given 64 MiB where nobody asks for more.
TINY_SHARED_BYTES = 64 * MIB
# Open MPI asks for 16 MiB a rank, MPICH takes 6; the rest is for mpillm's own stages and for gradients.
SHARED_BYTES_A_RANK = 64 * MIB
# With less, MPICH's ranks die of SIGBUS in MPI_Init.
FATAL_SHARED_BYTES = 16 * MIB
LEAST_MEMORY_A_RANK = 1 << 30
LEAST_OPEN_FILES = 1024
LEAST_LOCKED_BYTES = 64 * MIB
UNLIMITED = -1
# Of version 2 and 1 of control groups.
MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")


@dataclass(frozen=True)
class SharedMemory:
    """/dev/shm, in bytes; 0 and 0 where it is missing."""

    total: int
    free: int


@dataclass(frozen=True)
class Limits:
    """What a process may have; UNLIMITED where it may have any number."""

    open_files: int
    locked_bytes: int


@dataclass(frozen=True)
class HostMemory:
    """In bytes: what the host has, what a control group leaves of it, and what programs may still take."""

    total: int
    limit: int
    available: int


@dataclass(frozen=True)
class Cores:
    """What the ranks of this job on this host may use."""

    ranks: int
    cpus: int
    """Hardware threads that one rank or another may run on."""
    cores: int
    """The cores of these."""
    allowed: float
    """CPUs' worth of time that control groups and Slurm grant to all of them; infinite without a limit."""
    all_cores: int
    """Of the host."""
    threads: int | None
    """OMP_NUM_THREADS, None where it is not set."""

    @property
    def usable(self) -> float:
        return min(self.cores, self.allowed)


def read_shared(folder: Path = SHARED_MEMORY) -> SharedMemory:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return SharedMemory(0, 0)
    return SharedMemory(usage.total, usage.free)


def read_limits() -> Limits:
    def soft(which: int) -> int:
        limit = resource.getrlimit(which)[0]
        return UNLIMITED if limit == resource.RLIM_INFINITY else limit

    return Limits(soft(resource.RLIMIT_NOFILE), soft(resource.RLIMIT_MEMLOCK))


def system() -> str:
    return f"{platform.system()} {platform.release()}"


def processor(table: Path = Path("/proc/cpuinfo")) -> str:
    found = re.search(r"^(?:model name|cpu|Model)\s*:\s*(.+)$", text_of(table), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def read_memory(root: Path = Path("/")) -> HostMemory:
    """`root` holds `proc` and `sys`."""
    lines = {
        key: int(kib) * 1024
        for key, kib in re.findall(r"^(\w+):\s+(\d+) kB", text_of(root / "proc/meminfo"), re.M)
    }
    total = lines.get("MemTotal", 0)
    return HostMemory(total, min(total, memory_limit(root)), lines.get("MemAvailable", total))


def memory_limit(root: Path = Path("/")) -> int:
    """The tightest limit of this process's control groups, in bytes; a huge number without one."""
    files = [group / name for group in control_groups(root, "memory") for name in MEMORY_LIMITS]
    return min([1 << 62, *(number for file in files for number in _number(file))])


def _number(path: Path) -> list[int]:
    text = text_of(path)
    return [int(text)] if text.isdigit() else []


def cores_of(
    masks: Sequence[AbstractSet[int]], topology: Topology, allowed: float, threads: int | None
) -> Cores:
    """`masks`: the CPUs that each rank of this host may run on."""
    cpus = set[int]().union(*masks)
    return Cores(
        len(masks),
        len(cpus),
        len(topology.cores(cpus)),
        allowed,
        len(set(topology.core.values())) or len(cpus),
        threads,
    )


def judge_shared(shared: SharedMemory, ranks: int) -> Finding:
    """Whether /dev/shm holds what `ranks` ranks need of it."""
    name, needed = "/dev/shm", ranks * SHARED_BYTES_A_RANK
    found = f"{binary_bytes(shared.free)} free of {binary_bytes(shared.total)}"
    size = f"{-(-max(needed, 1 << 30) >> 30)}g"
    remedy = (
        f"make it larger: docker run --shm-size={size} (or --ipc=host), apptainer as it is; as root: "
        f"mount -o remount,size={size} /dev/shm"
    )
    if not shared.total:
        return Finding(
            AREA, name, "error", "there is none: MPI's ranks cannot share memory", remedy
        )
    if shared.total < TINY_SHARED_BYTES:
        return Finding(
            AREA, name, "error", f"{found}: too small for MPI's ranks to share memory", remedy
        )
    if shared.free < FATAL_SHARED_BYTES:
        remedy = "remove what killed jobs left there (ls -l /dev/shm), or " + remedy
        return Finding(AREA, name, "error", f"{found}: it is full", remedy)
    if shared.free < needed:
        found += f"; {ranks} rank{'s' if ranks != 1 else ''} may want {binary_bytes(needed)}"
        return Finding(AREA, name, "warning", found, remedy)
    return Finding(AREA, name, "ok", found)


def judge_cores(cores: Cores) -> Finding:
    """Whether the ranks here have cores enough: an error where more than two would share a hardware thread."""
    ranks, usable = cores.ranks, cores.usable
    many = f"{counted(ranks, 'rank')} on {counted(usable, 'core')}"
    if ranks > usable:
        most = min(cores.cpus, cores.allowed)
        verdict: Verdict = "error" if ranks > 2 * most else "warning"
        found = f"{many} ({cores_text(cores)}): they wait for each other"
        return Finding(AREA, "cores", verdict, found, _more_cores(ranks, usable))
    if cores.threads and cores.threads * ranks > usable:
        crowd = cores.threads * ranks
        found = f"{many}, and OMP_NUM_THREADS={cores.threads}: {crowd} threads crowd {counted(usable, 'core')}"
        remedy = f"export OMP_NUM_THREADS={max(1, int(usable // ranks))}, or unset it: mpillm shares the cores out"
        return Finding(AREA, "cores", "warning", found, remedy)
    return Finding(AREA, "cores", "ok", f"{many} ({cores_text(cores)})")


def cores_text(cores: Cores) -> str:
    """`2 of 64 cores may be used, 4 hardware threads`."""
    text = f"{cores.cores} of {cores.all_cores} may be used"
    if cores.cpus != cores.cores:
        text += f", {cores.cpus} hardware threads"
    if cores.allowed < cores.cores:
        text += f", for the time of {counted(cores.allowed, 'CPU')} by the control group or Slurm"
    return text


def _more_cores(ranks: int, usable: float) -> str:
    return (
        f"ask for a core a rank (sbatch --ntasks={ranks}; PBS ncpus={ranks}), start no more than "
        f"{max(1, math.floor(usable))} here with mpirun -n, or free them where the start holds them to few cores "
        "(mpirun --bind-to none; taskset)"
    )


def judge_memory(memory: HostMemory, ranks: int) -> Finding:
    """Whether there is memory for `ranks` ranks at all; what a model needs is the plan's matter."""
    free = min(memory.limit, memory.available)
    found = f"{binary_bytes(free)} free of {binary_bytes(memory.limit)}"
    if memory.limit < memory.total:
        found += f", the control group's limit on a host of {binary_bytes(memory.total)}"
    if free < ranks * LEAST_MEMORY_A_RANK:
        found += f" for {counted(ranks, 'rank')}, of which torch alone takes some 0.5 GiB each"
        return Finding(
            AREA,
            "memory",
            "warning",
            found,
            "end what else runs here, or ask for more (sbatch --mem=…)",
        )
    return Finding(AREA, "memory", "ok", found)


def judge_parts(topology: Topology, name: str, host_system: str) -> list[Finding]:
    """What kind of host it is: nothing of it can be wrong, all of it belongs to a report."""
    sockets, nodes = len(set(topology.socket.values())) or 1, len(set(topology.numa.values())) or 1
    found = f"{name}, {counted(sockets, 'socket')}, {counted(nodes, 'NUMA node')}"
    return [Finding(AREA, "processor", "ok", found), Finding(AREA, "system", "ok", host_system)]


def judge_limits(limits: Limits, world: int, infiniband: bool) -> list[Finding]:
    """Open files for a job of `world` ranks; locked memory, which InfiniBand alone cares for."""
    needed = LEAST_OPEN_FILES if world <= 256 else 4 * world
    files = "any number of" if limits.open_files == UNLIMITED else f"{limits.open_files:,}"
    findings = [Finding(AREA, "open files", "ok", f"{files} a process")]
    if UNLIMITED != limits.open_files < needed:
        found = f"{files} a process; {world} ranks may want {needed:,}"
        findings = [
            Finding(AREA, "open files", "warning", found, f"ulimit -n {needed} before the start")
        ]
    if infiniband:
        findings.append(judge_locked(limits.locked_bytes))
    return findings


def judge_locked(locked: int) -> Finding:
    name = "locked memory"
    if locked == UNLIMITED:
        return Finding(AREA, name, "ok", "unlimited")
    found = f"{binary_bytes(locked)} a process, and InfiniBand locks each message's memory"
    remedy = (
        "ulimit -l unlimited; as root: `* - memlock unlimited` in /etc/security/limits.d, LimitMEMLOCK=infinity for "
        "slurmd; docker --ulimit memlock=-1"
    )
    return Finding(AREA, name, "error" if locked < LEAST_LOCKED_BYTES else "warning", found, remedy)
