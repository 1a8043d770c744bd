"""The batch system: whose commands are on PATH, and the job around this process."""

from collections.abc import Iterable, Mapping

from mpillm.doctor.check_base import Check, JobView
from mpillm.doctor.findings import Finding
from mpillm.launch.current_job import CurrentJob, current_job
from mpillm.launch.schedulers.scheduler_catalog import known_systems

AREA = "batch system"


class BatchSystemCheck(Check):
    name, area = "found", AREA

    def examine_job(self, job: JobView) -> Iterable[Finding]:
        return [judge_systems(find_systems(job.environment), current_job(job.environment))]


def find_systems(environment: Mapping[str, str]) -> dict[str, str]:
    """Return batch system → its command to submit, of those on PATH."""
    found = {system.title: system.find(environment) for system in known_systems().values()}
    return {system: command for system, command in found.items() if command}


def judge_systems(systems: Mapping[str, str], job: CurrentJob | None) -> Finding:
    names = ", ".join(f"{system} ({command})" for system, command in systems.items())
    inside = f"; this is its job {job.id}" if job else ""
    return Finding(AREA, "found", "ok", (names or "none on PATH") + inside)
