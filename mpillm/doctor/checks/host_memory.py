"""Memory: whether the ranks of the host fit at all."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mpillm.doctor.check_base import Check, HostView
from mpillm.doctor.findings import Finding
from mpillm.machine.topology import ROOT, control_groups, text_of
from mpillm.system.console import binary_bytes, counted

AREA = "host"
# torch alone takes about half of it.
LEAST_MEMORY_A_RANK = 1 << 30
# Of version 2 and 1 of control groups.
MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")


@dataclass(frozen=True)
class HostMemory:
    """In bytes: the host's memory, the control group's limit, and what programs may still take."""

    total: int
    limit: int
    available: int


class MemoryCheck(Check):
    name, area = "memory", AREA

    def examine_host(self, host: HostView) -> Iterable[Finding]:
        memory = read_memory()
        host.facts["memory"] = f"{round(memory.total / (1 << 30))} GiB"
        return [judge_memory(memory, len(host.masks))]


def read_memory(root: Path = ROOT) -> HostMemory:
    """Read the memory of this host; `root` holds `proc` and `sys`."""
    lines = {
        key: int(kib) * 1024
        for key, kib in re.findall(r"^(\w+):\s+(\d+) kB", text_of(root / "proc/meminfo"), re.M)
    }
    total = lines.get("MemTotal", 0)
    return HostMemory(total, min(total, memory_limit(root)), lines.get("MemAvailable", total))


def memory_limit(root: Path = ROOT) -> int:
    """Return the tightest limit of this process's control groups, in bytes; huge without one."""
    files = [group / name for group in control_groups(root, "memory") for name in MEMORY_LIMITS]
    return min([1 << 62, *(number for file in files for number in _number(file))])


def _number(path: Path) -> list[int]:
    text = text_of(path)
    return [int(text)] if text.isdigit() else []


def judge_memory(memory: HostMemory, ranks: int) -> Finding:
    free = min(memory.limit, memory.available)
    found = f"{binary_bytes(free)} free of {binary_bytes(memory.limit)}"
    if memory.limit < memory.total:
        found += f", the control group's limit on a host of {binary_bytes(memory.total)}"
    if free < ranks * LEAST_MEMORY_A_RANK:
        found += f" for {counted(ranks, 'rank')}, of which torch alone takes some 0.5 GiB each"
        remedy = "end what else runs here, or ask for more (sbatch --mem=…)"
        return Finding(AREA, "memory", "warning", found, remedy)
    return Finding(AREA, "memory", "ok", found)
