"""Limits of a process: open files, and locked memory where there is InfiniBand."""

import resource
from collections.abc import Iterable
from dataclasses import dataclass

from mpillm.doctor.check_base import Check, HostView
from mpillm.doctor.checks.infiniband import read_ports
from mpillm.doctor.findings import Finding
from mpillm.system.console import binary_bytes

AREA = "host"
LEAST_OPEN_FILES = 1024
# Up to here that many files suffice; a larger job may open a few sockets for each rank.
FEW_RANKS, FILES_A_RANK = 256, 4
LEAST_LOCKED_BYTES = 64 << 20
UNLIMITED = -1


@dataclass(frozen=True)
class ProcessLimits:
    """The soft limits of a process; UNLIMITED without one."""

    open_files: int
    locked_bytes: int


class LimitsCheck(Check):
    name, area = "open files", AREA

    def examine_host(self, host: HostView) -> Iterable[Finding]:
        return judge_limits(read_limits(), host.job.ranks, bool(read_ports()))


def read_limits() -> ProcessLimits:
    def soft(which: int) -> int:
        limit = resource.getrlimit(which)[0]
        return UNLIMITED if limit == resource.RLIM_INFINITY else limit

    return ProcessLimits(soft(resource.RLIMIT_NOFILE), soft(resource.RLIMIT_MEMLOCK))


def judge_limits(limits: ProcessLimits, ranks: int, infiniband: bool) -> list[Finding]:
    """Judge open files for a job of `ranks`, and locked memory, which InfiniBand alone needs."""
    needed = LEAST_OPEN_FILES if ranks <= FEW_RANKS else FILES_A_RANK * ranks
    files = "any number of" if limits.open_files == UNLIMITED else f"{limits.open_files:,}"
    findings = [Finding(AREA, "open files", "ok", f"{files} a process")]
    if UNLIMITED != limits.open_files < needed:
        found = f"{files} a process; {ranks} ranks may need {needed:,}"
        remedy = f"ulimit -n {needed} before the start"
        findings = [Finding(AREA, "open files", "warning", found, remedy)]
    if infiniband:
        findings.append(judge_locked(limits.locked_bytes))
    return findings


def judge_locked(locked: int) -> Finding:
    name = "locked memory"
    if locked == UNLIMITED:
        return Finding(AREA, name, "ok", "unlimited")
    found = f"{binary_bytes(locked)} a process, and InfiniBand locks each message's memory"
    remedy = (
        "ulimit -l unlimited; as root: `* - memlock unlimited` in /etc/security/limits.d, "
        "LimitMEMLOCK=infinity for slurmd; docker --ulimit memlock=-1"
    )
    return Finding(AREA, name, "error" if locked < LEAST_LOCKED_BYTES else "warning", found, remedy)
