"""The kind of host: processor, sockets, NUMA nodes, system: for a report, none of it a fault."""

import platform
from collections.abc import Iterable

from mpillm.doctor.check_base import Check, HostView
from mpillm.doctor.findings import Finding
from mpillm.machine.cpu import processor
from mpillm.machine.topology import Topology, read_topology
from mpillm.system.console import counted

AREA = "host"


class ProcessorCheck(Check):
    name, area = "processor", AREA

    def examine_host(self, host: HostView) -> Iterable[Finding]:
        kernel, name = f"{platform.system()} {platform.release()}", processor()[0]
        host.facts.update({"Linux": kernel, "processor": name})
        return judge_processor(read_topology(), name, kernel)


def judge_processor(topology: Topology, name: str, kernel: str) -> list[Finding]:
    sockets, nodes = len(set(topology.socket.values())) or 1, len(set(topology.numa.values())) or 1
    found = f"{name}, {counted(sockets, 'socket')}, {counted(nodes, 'NUMA node')}"
    return [Finding(AREA, "processor", "ok", found), Finding(AREA, "system", "ok", kernel)]
