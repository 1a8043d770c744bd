"""A host's ways out: its network interfaces and InfiniBand ports, as Linux tells them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpillm.doctor.findings import Finding
from mpillm.machine.topology import text_of

AREA = "network"
NET, INFINIBAND = Path("/sys/class/net"), Path("/sys/class/infiniband")
ACTIVE = "ACTIVE"


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


@dataclass(frozen=True)
class Port:
    """A port of an InfiniBand (or RoCE) card: `ACTIVE`, `DOWN`, `INIT` …, and its rate as the driver words it."""

    name: str
    state: str
    rate: str

    @property
    def text(self) -> str:
        return f"{self.name} {self.rate if self.state == ACTIVE else self.state}"


def read_interfaces(folder: Path = NET) -> tuple[Interface, ...]:
    """All but the loopback, the real ones first."""
    found = [
        Interface(
            path.name,
            text_of(path / "operstate") or "unknown",
            _speed(path),
            (path / "device").exists(),
        )
        for path in _listed(folder)
        if path.name != "lo"
    ]
    return tuple(sorted(found, key=lambda one: (not one.physical, one.name)))


def _speed(path: Path) -> int | None:
    text = text_of(path / "speed")
    return int(text) if text.isdigit() and int(text) else None


def read_ports(folder: Path = INFINIBAND) -> tuple[Port, ...]:
    """`state` holds "4: ACTIVE", `rate` "100 Gb/sec (4X EDR)"."""
    ports = [
        (f"{card.name}/{port.name}", port)
        for card in _listed(folder)
        for port in _listed(card / "ports")
    ]
    return tuple(
        Port(name, text_of(port / "state").rpartition(" ")[2] or "unknown", text_of(port / "rate"))
        for name, port in ports
    )


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def judge_interfaces(interfaces: Sequence[Interface], job_hosts: int) -> Finding:
    """Whether another host can be reached at all; only what is up, or real, is named."""
    name = "interfaces"
    usable = [one for one in interfaces if one.up]
    if not usable:
        found = ", ".join(one.text for one in interfaces) or "none but the loopback"
        if job_hosts > 1:
            return Finding(
                AREA, name, "warning", f"{found}: none is up", "bring one up: ip link set NAME up"
            )
        return Finding(AREA, name, "ok", f"{found}: this host works alone")
    named = [one.text for one in interfaces if one.up or one.physical]
    return Finding(
        AREA,
        name,
        "ok",
        ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else ""),
    )


def judge_ports(ports: Sequence[Port]) -> Finding:
    """Whether InfiniBand is ready, where there is any."""
    name, found = "InfiniBand", ", ".join(port.text for port in ports)
    if not ports:
        return Finding(AREA, name, "ok", "none")
    waiting = [port for port in ports if port.state in ("INIT", "ARMED")]
    if any(port.state == ACTIVE for port in ports) and not waiting:
        return Finding(AREA, name, "ok", found)
    remedy = "check the cable and the switch (ibstat, iblinkinfo)"
    if waiting:
        remedy = (
            "the port waits for a subnet manager: is opensm running on the fabric (ibstat, sminfo)?"
        )
    active = any(port.state == ACTIVE for port in ports)
    return Finding(
        AREA,
        name,
        "warning" if active else "error",
        found if active else f"{found}: none is active",
        remedy,
    )
