"""The memory of this host, and of it what this job's control groups leave."""

import re
from dataclasses import dataclass
from pathlib import Path

from mpillm.machine.topology import ROOT, control_groups, text_of

# Of version 2 and 1 of control groups.
MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")


@dataclass(frozen=True)
class HostMemory:
    """In bytes: the host's memory, the control group's limit, and what programs may still take."""

    total: int
    limit: int
    available: int

    @property
    def usable(self) -> int:
        """What this job may still take, in bytes; 0 where Linux does not say."""
        return min(self.limit, self.available)


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
