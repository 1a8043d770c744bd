"""Network interfaces: whether any of the host is up, by Linux's own list."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpillm.doctor.check_base import Check, HostView
from mpillm.doctor.checks.infiniband import listed
from mpillm.doctor.findings import Finding
from mpillm.machine.topology import text_of

AREA = "network"
NET = Path("/sys/class/net")
# A host with many virtual interfaces should not fill the report.
MOST_NAMED = 8


@dataclass(frozen=True)
class Interface:
    """A network interface; `megabits` a second, None where it has no speed of its own."""

    name: str
    state: str
    megabits: int | None
    physical: bool

    @property
    def up(self) -> bool:
        # Tunnels and some virtual cards do not know their state.
        return self.state in ("up", "unknown")

    @property
    def text(self) -> str:
        if not self.up:
            return f"{self.name} {self.state}"
        return self.name + (f" {self.megabits / 1000:g} Gb/s" if self.megabits else " up")


class InterfacesCheck(Check):
    name, area = "interfaces", AREA

    def examine_host(self, host: HostView) -> Iterable[Finding]:
        return [judge_interfaces(read_interfaces(), host.job.hosts)]


def read_interfaces(folder: Path = NET) -> tuple[Interface, ...]:
    """Read all interfaces but the loopback, the physical ones first."""
    found = [
        Interface(
            path.name,
            text_of(path / "operstate") or "unknown",
            _speed(path),
            (path / "device").exists(),
        )
        for path in listed(folder)
        if path.name != "lo"
    ]
    return tuple(sorted(found, key=lambda interface: (not interface.physical, interface.name)))


def _speed(path: Path) -> int | None:
    text = text_of(path / "speed")
    return int(text) if text.isdigit() and int(text) else None


def judge_interfaces(interfaces: Sequence[Interface], job_hosts: int) -> Finding:
    """Judge whether another host can be reached; name interfaces that are up or physical."""
    name = "interfaces"
    if not any(interface.up for interface in interfaces):
        found = ", ".join(interface.text for interface in interfaces) or "none but the loopback"
        if job_hosts > 1:
            remedy = "bring one up: ip link set NAME up"
            return Finding(AREA, name, "warning", f"{found}: none is up", remedy)
        return Finding(AREA, name, "ok", f"{found}: this host works alone")
    texts = [interface.text for interface in interfaces if interface.up or interface.physical]
    more = f" and {len(texts) - MOST_NAMED} more" if len(texts) > MOST_NAMED else ""
    return Finding(AREA, name, "ok", ", ".join(texts[:MOST_NAMED]) + more)
