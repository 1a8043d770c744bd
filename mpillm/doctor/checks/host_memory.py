"""Memory: whether the ranks of the host fit at all."""

from collections.abc import Iterable

from mpillm.doctor.check_base import Check, HostView
from mpillm.doctor.findings import Finding
from mpillm.machine.memory import HostMemory, read_memory
from mpillm.system.console import binary_bytes, counted

AREA = "host"
# torch alone takes about half of it.
LEAST_MEMORY_A_RANK = 1 << 30


class MemoryCheck(Check):
    name, area = "memory", AREA

    def examine_host(self, host: HostView) -> Iterable[Finding]:
        memory = read_memory()
        host.facts["memory"] = f"{round(memory.total / (1 << 30))} GiB"
        return [judge_memory(memory, len(host.masks))]


def judge_memory(memory: HostMemory, ranks: int) -> Finding:
    free = memory.usable
    found = f"{binary_bytes(free)} free of {binary_bytes(memory.limit)}"
    if memory.limit < memory.total:
        found += f", the control group's limit on a host of {binary_bytes(memory.total)}"
    if free < ranks * LEAST_MEMORY_A_RANK:
        found += f" for {counted(ranks, 'rank')}, of which torch alone takes some 0.5 GiB each"
        remedy = "end what else runs here, or ask for more (sbatch --mem=…)"
        return Finding(AREA, "memory", "warning", found, remedy)
    return Finding(AREA, "memory", "ok", found)
