"""The batch systems: submit a job to each, and ask each for the state of a job."""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpillm.errors import LaunchError, UsageError

# `mpillm status` should answer while a controller hangs.
QUESTION_SECONDS = 10.0
# A busy controller may take a minute.
SUBMIT_SECONDS = 120.0
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@\[\]-]*", re.ASCII)


@dataclass(frozen=True)
class Scheduler:
    """A batch system and its command to submit."""

    title: str
    submit: tuple[str, ...]
    """The command that submits the script job.sh of the current folder, without options."""
    by_input: bool
    """The script goes to the command's standard input."""
    answer: str
    """The pattern of its answer; the group is the job's number."""


SCHEDULERS = {
    "slurm": Scheduler("Slurm", ("sbatch", "--parsable"), False, r"^(\d+)(?:;\S+)?$"),
    "pbs": Scheduler("PBS", ("qsub",), False, r"^(\d+(?:\[\d*\])?(?:\.[\w.-]+)?)$"),
    "lsf": Scheduler("LSF", ("bsub",), True, r"^Job <(\d+)> is submitted"),
}
# PBS: qstat(1B), the job states. The other two speak in words.
PBS_STATES = {
    "B": "BEGUN",
    "E": "EXITING",
    "F": "FINISHED",
    "H": "HELD",
    "M": "MOVED",
    "Q": "QUEUED",
    "R": "RUNNING",
    "S": "SUSPENDED",
    "T": "MOVING",
    "U": "SUSPENDED",
    "W": "WAITING",
    "X": "FINISHED",
    "C": "COMPLETED",
}
OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
    "FINISHED",
    "MOVED",
    "DONE",
    "EXIT",
    "ZOMBI",
}


def find_scheduler(name: str, environment: Mapping[str, str]) -> str:
    """Return `name`, or for auto the batch system whose command is on PATH.

    Slurm goes first, for its packages bring a qsub too. Raises UsageError where there is none.
    """
    if name in SCHEDULERS:
        return name
    if name != "auto":
        raise UsageError(f"--scheduler is auto, {', '.join(SCHEDULERS)}, and not {name!r}")
    found = next(
        (known for known in SCHEDULERS if _which(SCHEDULERS[known].submit[0], environment)), None
    )
    if found is None:
        tried = ", ".join(f"{system.submit[0]} ({system.title})" for system in SCHEDULERS.values())
        raise UsageError(
            f"no batch system is here: none of {tried} is on PATH; submit from a login node, or "
            "name one with --scheduler and --dry-run to see its script"
        )
    return found


def submit_script(name: str, folder: str, environment: Mapping[str, str]) -> str:
    """Submit the script job.sh in `folder`; return the job's number.

    Raises LaunchError with the batch system's own words.
    """
    system = SCHEDULERS[name]
    program = _which(system.submit[0], environment)
    if program is None:
        raise LaunchError(
            f"{system.submit[0]} of {system.title} is not on PATH; submit from a login node"
        )
    # --chdir is an option here and not a directive: an argument may hold any character.
    options = [f"--chdir={folder}"] if name == "slurm" else []
    words = [program, *system.submit[1:], *options, *([] if system.by_input else ["job.sh"])]
    done = _run(
        words, environment, SUBMIT_SECONDS, folder, f"{folder}/job.sh" if system.by_input else None
    )
    if done is None:
        raise LaunchError(
            f"{system.submit[0]} gave no answer within {SUBMIT_SECONDS:g} s; the job may be queued "
            "or not: check before you submit it again"
        )
    answer = " ".join(
        (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").split()
    )
    if done.returncode:
        raise LaunchError(f"{system.title} refused the job: {answer}")
    found = re.search(system.answer, done.stdout.strip(), re.MULTILINE)
    if not found:
        raise LaunchError(
            f"{system.submit[0]} did not print the job's number, but {answer!r}; "
            "check whether it is queued"
        )
    return found[1]


def job_state(scheduler: str, job: str, environment: Mapping[str, str]) -> str | None:
    """Ask the batch system for the state of a job, as its own word (PENDING, RUNNING, DONE …).

    Returns None where it does not answer. Each question takes at most QUESTION_SECONDS.
    """
    if not _ID.fullmatch(job):
        return None
    if scheduler == "slurm":
        return (
            _word(["squeue", "-h", "-j", job, "-o", "%T"], r"^(\w+)", environment)
            or _word(["scontrol", "show", "job", job], r"JobState=(\w+)", environment)
            or _word(["sacct", "-n", "-X", "-j", job, "-o", "State"], r"^\s*(\w+)", environment)
        )
    if scheduler == "pbs":
        letter = _word(["qstat", "-f", "-x", job], r"job_state = (\w)", environment)
        return PBS_STATES.get(letter, letter) if letter else None
    if scheduler == "lsf":
        return _word(["bjobs", "-noheader", "-o", "stat", job], r"^\s*([A-Z]+)", environment)
    return None


def is_over(state: str) -> bool:
    """Return whether a job in this state will never run again by itself."""
    return state in OVER


def _word(words: Sequence[str], pattern: str, environment: Mapping[str, str]) -> str | None:
    program = _which(words[0], environment)
    if program is None:
        return None
    done = _run([program, *words[1:]], environment, QUESTION_SECONDS)
    found = (
        re.search(pattern, done.stdout, re.MULTILINE)
        if done is not None and done.returncode == 0
        else None
    )
    return found[1] if found else None


def _run(
    words: Sequence[str],
    environment: Mapping[str, str],
    seconds: float,
    folder: str | None = None,
    script: str | None = None,
) -> "subprocess.CompletedProcess[str] | None":
    """Run a command of the batch system; None after `seconds`. Raises LaunchError."""
    try:
        with open(script or "/dev/null", "rb") as stdin:  # noqa: PTH123 # the path is text
            return subprocess.run(
                words,
                env=dict(environment),
                cwd=folder,
                stdin=stdin,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
    except subprocess.TimeoutExpired:
        return None
    except OSError as failure:
        raise LaunchError(f"cannot run {words[0]}: {failure.strerror}") from failure


def _which(program: str, environment: Mapping[str, str]) -> str | None:
    return shutil.which(program, path=environment.get("PATH", ""))
