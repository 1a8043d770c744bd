"""The batch system: whose commands are on PATH, and the job around this process."""

import shutil
from collections.abc import Iterable, Mapping

from mpillm.doctor.check_base import Check, JobView
from mpillm.doctor.findings import Finding
from mpillm.launch.current_job import CurrentJob, current_job
from mpillm.launch.schedulers import SCHEDULERS

AREA = "batch system"
# Flux can start ranks, and `mpillm submit` has no script for it.
SYSTEMS = {system.submit[0]: system.title for system in SCHEDULERS.values()} | {"flux": "Flux"}


class BatchSystemCheck(Check):
    name, area = "found", AREA

    def examine_job(self, job: JobView) -> Iterable[Finding]:
        return [judge_systems(find_systems(job.environment), current_job(job.environment))]


def find_systems(environment: Mapping[str, str]) -> dict[str, str]:
    """Return batch system → its command to submit, of those on PATH."""
    path = environment.get("PATH", "")
    found = {system: shutil.which(command, path=path) for command, system in SYSTEMS.items()}
    return {system: command for system, command in found.items() if command}


def judge_systems(systems: Mapping[str, str], job: CurrentJob | None) -> Finding:
    names = ", ".join(f"{system} ({command})" for system, command in systems.items())
    inside = f"; this is its job {job.id}" if job else ""
    return Finding(AREA, "found", "ok", (names or "none on PATH") + inside)
