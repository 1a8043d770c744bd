"""The memory of this host, and of it what this job's control groups leave."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mpillm.machine.topology import ROOT, control_groups, text_of

# Of version 2 and 1 of control groups.
MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")
MEMORY_USES = ("memory.current", "memory.usage_in_bytes")


@dataclass(frozen=True)
class HostMemory:
    """In bytes: the host's memory, the control group's limit, and what programs may still take."""

    total: int
    limit: int
    available: int
    left: int = 1 << 62
    """What the control groups leave: the limit without what they hold and cannot drop."""

    @property
    def usable(self) -> int:
        """What this job may still take, in bytes; 0 where Linux does not say."""
        # A group that is full leaves next to nothing, which is not the same as not known.
        return max(1, min(self.limit, self.left, self.available)) if self.total else 0


def read_memory(root: Path = ROOT) -> HostMemory:
    """Read the memory of this host; `root` holds `proc` and `sys`."""
    lines = {
        key: int(kib) * 1024
        for key, kib in re.findall(r"^(\w+):\s+(\d+) kB", text_of(root / "proc/meminfo"), re.M)
    }
    total = lines.get("MemTotal", 0)
    left = [limit - _held(group) for group, limit in _limits(root)]
    return HostMemory(
        total,
        min(total, memory_limit(root)),
        lines.get("MemAvailable", total),
        min(left, default=HostMemory.left),
    )


def resident_bytes(root: Path = ROOT) -> int:
    """Return the resident set of this process, in bytes; 0 where Linux does not say."""
    return _of_status("VmRSS", root)


def peak_resident_bytes(root: Path = ROOT) -> int:
    """Return the largest resident set of this process, in bytes; 0 where Linux does not say.

    getrusage's ru_maxrss begins with that of the process which started this one.
    """
    return _of_status("VmHWM", root)


def _of_status(key: str, root: Path) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", text_of(root / "proc/self/status"), re.M)
    return int(found[1]) * 1024 if found else 0


def memory_limit(root: Path = ROOT) -> int:
    """Return the tightest limit of this process's control groups, in bytes; huge without one."""
    return min((limit for _, limit in _limits(root)), default=1 << 62)


def _limits(root: Path) -> Iterator[tuple[Path, int]]:
    """Yield each control group of this process that has a limit, with it."""
    for group in control_groups(root, "memory"):
        for name in MEMORY_LIMITS:
            yield from ((group, limit) for limit in _number(group / name))


def _held(group: Path) -> int:
    """Return the bytes that the group's programs hold; the cache of files is dropped when needed.

    A group counts the file pages that its programs read as its own.
    """
    held = max([0, *(number for name in MEMORY_USES for number in _number(group / name))])
    cache = re.search(r"^(?:total_)?inactive_file (\d+)$", text_of(group / "memory.stat"), re.M)
    return max(0, held - (int(cache[1]) if cache else 0))


def _number(path: Path) -> list[int]:
    text = text_of(path)
    return [int(text)] if text.isdigit() else []
