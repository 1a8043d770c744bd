"""The batch system, the site file and the cluster profile."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpillm.doctor.findings import Finding
from mpillm.errors import MpillmError
from mpillm.launch.current_job import CurrentJob
from mpillm.launch.schedulers import SCHEDULERS

AREA, PROFILE_AREA = "batch system", "cluster profile"
# Flux can start ranks, and `mpillm submit` has no script for it.
SYSTEMS = {system.submit[0]: system.title for system in SCHEDULERS.values()} | {"flux": "Flux"}
STARTERS = ("srun", "jsrun", "flux", "aprun")


def find_systems(environment: Mapping[str, str]) -> dict[str, str]:
    """Batch system → the command that sends a job to it, of those on PATH."""
    path = environment.get("PATH", "")
    found = {system: shutil.which(command, path=path) for command, system in SYSTEMS.items()}
    return {system: command for system, command in found.items() if command}


def starters(environment: Mapping[str, str]) -> bool:
    """Whether another program than mpirun can start ranks."""
    return any(shutil.which(name, path=environment.get("PATH", "")) for name in STARTERS)


def judge_systems(systems: Mapping[str, str], job: CurrentJob | None) -> Finding:
    found = (
        ", ".join(f"{system} ({command})" for system, command in systems.items()) or "none on PATH"
    )
    return Finding(AREA, "found", "ok", found + (f"; this is its job {job.id}" if job else ""))


def judge_site(path: Path | None, load: Callable[[Path | None], Any]) -> tuple[Finding, Any]:
    """The site file and what `load` made of it, None where that failed. `path`: what the user named, if anything."""
    name, whose = "site file", str(path) if path else "~/.config/mpillm/site.toml"
    try:
        site = load(path)
    except MpillmError as failure:
        remedy = f"mend {whose}; jobs/sites has examples"
        return Finding(
            AREA, name, "error", str(failure).removesuffix("; jobs/sites has examples"), remedy
        ), None
    if path is None and site == type(site)():
        return Finding(
            AREA, name, "ok", "none, or an empty one; `mpillm submit` works without"
        ), site
    return Finding(AREA, name, "ok", f"{whose} can be read"), site


def judge_profile(
    path: Path, load: Callable[[Path, Callable[[str], None], Any], Any], cluster: Any
) -> Finding:
    """Whether the profile at `path` is of this `cluster`. A stale one does no harm, for it is ignored."""
    warnings: list[str] = []
    try:
        load(path, warnings.append, cluster)
    except MpillmError as failure:
        return _split(str(failure), "error")
    if warnings:
        return _split(warnings[0], "warning")
    return Finding(PROFILE_AREA, path.name, "ok", f"{path} is of this cluster")


def _split(sentence: str, verdict: Any) -> Finding:
    """comm.profile's sentences end in the way out."""
    found, _, remedy = sentence.rpartition("; ")
    return Finding(
        PROFILE_AREA, "stale" if verdict == "warning" else "unusable", verdict, found, remedy
    )
