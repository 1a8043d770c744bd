"""The batch job around this process, from its environment: number, restarts, end, hosts."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mpillm.errors import UsageError
from mpillm.launch.launchers import number
from mpillm.launch.schedulers.batch_system import BatchSystem
from mpillm.launch.schedulers.scheduler_catalog import known_systems, load_scheduler

END_VARIABLE, RESTART_VARIABLE = "MPILLM_JOB_END", "MPILLM_JOB_RESTART"
# The scripts of a plug-in export its name: a job's own variables do not lead to it.
SCHEDULER_VARIABLE = "MPILLM_SCHEDULER"
# The year 5138: a later time is no time, and calendars overflow.
LATEST_END = 1e11


@dataclass(frozen=True)
class CurrentJob:
    scheduler: str
    """A name of the catalogue, or a plug-in's `package.module:Name`."""
    id: str
    restart: int = 0
    """The number of earlier starts of the job: 0 the first time."""


def current_job(environment: Mapping[str, str]) -> CurrentJob | None:
    """Return the batch job around this process, None outside of one."""
    name, system = _current_system(environment)
    if system is None:
        return None
    return CurrentJob(name, environment[system.job_variable], _restart(environment))


def job_end(
    environment: Mapping[str, str],
    now: float = 0.0,
    warn: Callable[[str], None] | None = None,
) -> float | None:
    """Return when the batch system ends this process, in unix seconds; None where unknown.

    MPILLM_JOB_END goes before the system's own variable: the scripts of `mpillm submit` export it,
    and a user may set it. An end before `now` is of an earlier job: `warn` gets a line that names
    the variable, and it is passed over. Raises UsageError where MPILLM_JOB_END does not hold a
    time.
    """
    ends = {END_VARIABLE: _set_end(environment)}
    ends |= {
        system.end_variable: number(environment, system.end_variable)
        for system in _systems(environment).values()
        if system.end_variable
    }
    for variable, end in ends.items():
        if end is None or end >= LATEST_END:
            continue
        if end > now:
            return float(end)
        if warn:
            warn(
                f"{variable}={environment[variable]} is over since {_local_time(end)}: it is of an "
                f"earlier job and sets no deadline; unset {variable}"
            )
    return None


def _set_end(environment: Mapping[str, str]) -> float | None:
    setting = environment.get(END_VARIABLE, "")
    if not setting:
        return None
    try:
        end = float(setting)
    except ValueError:
        end = math.nan
    if not 0 <= end < LATEST_END:
        raise UsageError(
            f"{END_VARIABLE} is the end of the job in unix seconds, such as "
            f"$(($(date +%s) + 3600)), and not {setting!r}; set it so or unset it"
        )
    return end


def _local_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def job_hosts(environment: Mapping[str, str]) -> tuple[list[str], BatchSystem | None]:
    """Return the hosts of this job's allocation, each once, and its batch system.

    Returns [] and None outside of a job.
    """
    for system in _systems(environment).values():
        if environment.get(system.hosts_variable):
            return system.hosts(environment), system
    return [], None


def foreign_job(environment: Mapping[str, str], host: str) -> str:
    """Say that the variables of a batch job name other hosts than `host`; "" where they fit.

    A shell that was opened in a job may outlive it, and keep its variables.
    """
    hosts, system = job_hosts(environment)
    names = {name.partition(".")[0] for name in hosts}
    if system is None or not environment.get(system.job_variable):
        return ""
    if not hosts or host.partition(".")[0] in names:
        return ""
    variable = system.job_variable
    return (
        f"{variable}={environment[variable]} is of a job on {', '.join(hosts[:3])}, and this host "
        f"is {host}; if that job is over, unset {variable}"
    )


def granted_cpus(environment: Mapping[str, str]) -> int | None:
    """Return the CPUs of this node that the batch system grants the job; None where unknown."""
    systems = _systems(environment).values()
    return _first_number([system.cpus_variable for system in systems], environment)


def next_job_environment(environment: Mapping[str, str], system: BatchSystem) -> dict[str, str]:
    """Return the environment to submit a job to `system` from.

    The end and the restarts of a job around this process are not those of the new job.
    """
    dropped = {END_VARIABLE, RESTART_VARIABLE, SCHEDULER_VARIABLE}
    for known in (*_systems(environment).values(), system):
        dropped |= {known.end_variable, known.restart_variable}
    return {name: value for name, value in environment.items() if name not in dropped}


def _systems(environment: Mapping[str, str]) -> dict[str, BatchSystem]:
    """Return name → batch system: a plug-in whose script started this job, then the catalogue."""
    plugin = environment.get(SCHEDULER_VARIABLE, "")
    return ({plugin: load_scheduler(plugin)} if plugin else {}) | known_systems()


def _current_system(environment: Mapping[str, str]) -> tuple[str, BatchSystem | None]:
    for name, system in _systems(environment).items():
        if environment.get(system.job_variable):
            return name, system
    return "", None


def _restart(environment: Mapping[str, str]) -> int:
    # A system that counts its requeues goes first; the scripts of the others count elsewhere.
    names = [system.restart_variable for system in _systems(environment).values()]
    return _first_number([*names, RESTART_VARIABLE], environment) or 0


def _first_number(names: Sequence[str], environment: Mapping[str, str]) -> int | None:
    """Read the first of the variables that holds a whole number; None where none does."""
    numbers = (number(environment, name) for name in names if name)
    return next((found for found in numbers if found is not None), None)
