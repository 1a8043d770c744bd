"""Shared memory: whether /dev/shm holds what the ranks of the host need."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mpillm.doctor.check_base import Check, HostView
from mpillm.doctor.findings import Finding
from mpillm.system.console import binary_bytes, counted

AREA = "host"
MIB = 1 << 20
SHARED_MEMORY = Path("/dev/shm")
# The default of containers is 64 MiB.
TINY_SHARED_BYTES = 64 * MIB
# Open MPI asks for 16 MiB a rank, MPICH takes 6; the rest is for mpillm's segments and gradients.
SHARED_BYTES_A_RANK = 64 * MIB
# With less, MPICH's ranks die of SIGBUS in MPI_Init.
FATAL_SHARED_BYTES = 16 * MIB


@dataclass(frozen=True)
class SharedMemory:
    """/dev/shm, in bytes; 0 and 0 where it is missing."""

    total: int
    free: int


class SharedMemoryCheck(Check):
    name, area = "/dev/shm", AREA

    def examine_host(self, host: HostView) -> Iterable[Finding]:
        return [judge_shared(read_shared(), len(host.masks))]


def read_shared(folder: Path = SHARED_MEMORY) -> SharedMemory:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return SharedMemory(0, 0)
    return SharedMemory(usage.total, usage.free)


def judge_shared(shared: SharedMemory, ranks: int) -> Finding:
    """Judge whether /dev/shm holds what `ranks` ranks need of it."""
    name, needed = "/dev/shm", ranks * SHARED_BYTES_A_RANK
    found = f"{binary_bytes(shared.free)} free of {binary_bytes(shared.total)}"
    size = f"{-(-max(needed, 1 << 30) >> 30)}g"
    remedy = (
        f"make it larger: docker run --shm-size={size} (or --ipc=host), apptainer as it is; "
        f"as root: mount -o remount,size={size} /dev/shm"
    )
    if not shared.total:
        missing = "there is none: MPI's ranks cannot share memory"
        return Finding(AREA, name, "error", missing, remedy)
    if shared.total < TINY_SHARED_BYTES:
        tiny = f"{found}: too small for MPI's ranks to share memory"
        return Finding(AREA, name, "error", tiny, remedy)
    if shared.free < FATAL_SHARED_BYTES:
        remedy = "remove what killed jobs left there (ls -l /dev/shm), or " + remedy
        return Finding(AREA, name, "error", f"{found}: it is full", remedy)
    if shared.free < needed:
        found += f"; {counted(ranks, 'rank')} may need {binary_bytes(needed)}"
        return Finding(AREA, name, "warning", found, remedy)
    return Finding(AREA, name, "ok", found)
