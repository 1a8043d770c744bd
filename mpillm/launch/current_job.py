"""The batch job around this process, from its environment: number, restarts, end."""

from collections.abc import Mapping
from dataclasses import dataclass

from mpillm.errors import UsageError

# Slurm before Flux: a Flux instance may run inside a Slurm job, whose end then counts.
JOB_VARIABLES = {
    "slurm": "SLURM_JOB_ID",
    "pbs": "PBS_JOBID",
    "lsf": "LSB_JOBID",
    "flux": "FLUX_JOB_ID",
}
END_VARIABLE, SLURM_END_VARIABLE = "MPILLM_JOB_END", "SLURM_JOB_END_TIME"
END_VARIABLES = (END_VARIABLE, SLURM_END_VARIABLE)
RESTART_VARIABLE = "MPILLM_JOB_RESTART"
# Slurm counts its requeues; the scripts of `mpillm submit` count elsewhere.
RESTART_VARIABLES = ("SLURM_RESTART_COUNT", RESTART_VARIABLE)


@dataclass(frozen=True)
class CurrentJob:
    scheduler: str
    """slurm, pbs, lsf or flux."""
    id: str
    restart: int = 0
    """The number of earlier starts of the job: 0 the first time."""


def current_job(environment: Mapping[str, str]) -> CurrentJob | None:
    """Return the batch job around this process, None outside of one."""
    for scheduler, variable in JOB_VARIABLES.items():
        if environment.get(variable):
            return CurrentJob(scheduler, environment[variable], _restart(environment))
    return None


def job_end(environment: Mapping[str, str]) -> float | None:
    """Return when the batch system ends this process, in unix seconds; None where unknown.

    MPILLM_JOB_END goes before Slurm's own variable: the scripts of `mpillm submit` export it, and
    a user may set it. Raises UsageError where it does not hold a number.
    """
    setting = environment.get(END_VARIABLE, "")
    if setting:
        try:
            return float(setting)
        except ValueError:
            raise UsageError(
                f"{END_VARIABLE} is the end of the job in unix seconds, such as "
                f"$(($(date +%s) + 3600)), and not {setting!r}; set it so or unset it"
            ) from None
    end = environment.get(SLURM_END_VARIABLE, "")
    return float(end) if end.isascii() and end.isdigit() else None


def _restart(environment: Mapping[str, str]) -> int:
    for variable in RESTART_VARIABLES:
        count = environment.get(variable, "")
        if count.isascii() and count.isdigit():
            return int(count)
    return 0
