"""InfiniBand (and RoCE): whether the ports of the host are active."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpillm.doctor.check_base import Check, HostView
from mpillm.doctor.findings import Finding
from mpillm.machine.topology import text_of

AREA = "network"
INFINIBAND = Path("/sys/class/infiniband")
ACTIVE = "ACTIVE"


@dataclass(frozen=True)
class CardPort:
    """A port of a card: `ACTIVE`, `DOWN`, `INIT` …, and its rate in the driver's words."""

    name: str
    state: str
    rate: str

    @property
    def text(self) -> str:
        return f"{self.name} {self.rate if self.state == ACTIVE else self.state}"


class InfiniBandCheck(Check):
    name, area = "InfiniBand", AREA

    def examine_host(self, host: HostView) -> Iterable[Finding]:
        ports = read_ports()
        host.facts["InfiniBand"] = ", ".join(port.text for port in ports) or "none"
        return [judge_ports(ports)]


def read_ports(folder: Path = INFINIBAND) -> tuple[CardPort, ...]:
    """Read the ports; `state` holds "4: ACTIVE", `rate` "100 Gb/sec (4X EDR)"."""
    ports = [
        (f"{card.name}/{port.name}", port)
        for card in listed(folder)
        for port in listed(card / "ports")
    ]
    return tuple(
        CardPort(
            name, text_of(port / "state").rpartition(" ")[2] or "unknown", text_of(port / "rate")
        )
        for name, port in ports
    )


def listed(folder: Path) -> list[Path]:
    """List a folder of /sys, sorted; empty where it is missing."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def judge_ports(ports: Sequence[CardPort]) -> Finding:
    """Judge whether InfiniBand is ready, where there is any."""
    name, found = "InfiniBand", ", ".join(port.text for port in ports)
    if not ports:
        return Finding(AREA, name, "ok", "none")
    active = any(port.state == ACTIVE for port in ports)
    waiting = any(port.state in ("INIT", "ARMED") for port in ports)
    if active and not waiting:
        return Finding(AREA, name, "ok", found)
    remedy = "check the cable and the switch (ibstat, iblinkinfo)"
    if waiting:
        remedy = (
            "the port waits for a subnet manager: is opensm running on the fabric (ibstat, sminfo)?"
        )
    if active:
        return Finding(AREA, name, "warning", found, remedy)
    return Finding(AREA, name, "error", f"{found}: none is active", remedy)
