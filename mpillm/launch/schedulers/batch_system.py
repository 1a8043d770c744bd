"""The interface of a batch system: how a job is submitted, asked for, and known from inside.

A system is a `BatchSystem` of plain fields; a system that differs in more overrides its methods.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpillm.errors import LaunchError
from mpillm.launch.walltime import clock_time

# `mpillm status` should answer while a controller hangs.
QUESTION_SECONDS = 10.0
# A busy controller may take a minute.
SUBMIT_SECONDS = 120.0


@dataclass(frozen=True)
class StateQuery:
    """A command that prints the state of a job, and the pattern whose group is that state."""

    command: tuple[str, ...]
    """`{job}` is replaced by the job's number."""
    pattern: str


@dataclass(frozen=True, kw_only=True)
class BatchSystem:
    """The facts of one batch system; all but `title`, `submit` and `job_variable` have defaults."""

    title: str
    """Its name in a sentence."""
    submit: tuple[str, ...]
    """The command that submits job.sh of the current folder; `{folder}` is that folder's path.

    `--scheduler auto` takes the first system of the catalogue whose command is on PATH.
    """
    by_input: bool = False
    """The script goes to the command's standard input."""
    answer: str = r"^(\S+)$"
    """The pattern of the command's answer; the group is the job's number."""

    queries: tuple[StateQuery, ...] = ()
    """The first that answers gives the state."""
    state_words: Mapping[str, str] = field(default_factory=dict)
    """Answer → the state in words; an answer that is missing here is the state itself."""
    over: frozenset[str] = frozenset()
    """States of jobs that will never run again by themselves."""

    template: Path | None = None
    """A name in jobs/templates, or the absolute path of a template next to a plug-in.

    None: ranks can run under the system, and `mpillm submit` has no script for it.
    """
    limit_signals: str = "USR1"
    """The signals before the end of the wall time, as words of bash's `trap`."""
    given_up_code: int = 75
    """The exit code of a script that leaves an unfinished run."""
    has_qos: bool = False
    """Whether there are qualities of service."""
    launcher: str = "mpirun"
    """The launcher of the ranks where the site file names none."""
    own_launchers: tuple[str, ...] = ()
    """Launchers that exist under this system alone."""

    job_variable: str
    """The environment variable that holds the job's number; set in every process of a job."""
    restart_variable: str = ""
    """The variable that counts earlier starts of the job; "": the script counts."""
    end_variable: str = ""
    """The variable that holds the end of the wall time, in unix seconds; "": the script sets it."""
    hosts_variable: str = ""
    """The variable that names the allocation's hosts: here a file of one line a slot."""
    cpus_variable: str = ""
    """The variable that holds the number of the job's CPUs on this node."""

    @property
    def ranks_need_ssh(self) -> bool:
        """Whether the default launcher starts its daemons by ssh."""
        return self.launcher not in self.own_launchers

    def find(self, environment: Mapping[str, str]) -> str | None:
        """Return the path of the command to submit; None where it is not on PATH."""
        return find_program(self.submit[0], environment)

    def write_time(self, seconds: int) -> str:
        """Write a wall time as the directives want it: 5,400 s as `01:30:00`."""
        return clock_time(seconds)

    def submit_script(self, folder: str, environment: Mapping[str, str]) -> str:
        """Submit the script job.sh in `folder`; return the job's number.

        Raises LaunchError with the batch system's own words.
        """
        program = self.find(environment)
        if program is None:
            raise LaunchError(
                f"{self.submit[0]} of {self.title} is not on PATH; submit from a login node"
            )
        words = [program, *(word.format(folder=folder) for word in self.submit[1:])]
        script = f"{folder}/job.sh" if self.by_input else None
        done = run_program(words, environment, SUBMIT_SECONDS, folder, script)
        if done is None:
            raise LaunchError(
                f"{self.submit[0]} gave no answer within {SUBMIT_SECONDS:g} s; the job may be "
                "queued or not: check before you submit it again"
            )
        answer = " ".join(
            (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").split()
        )
        if done.returncode:
            raise LaunchError(f"{self.title} refused the job: {answer}")
        found = re.search(self.answer, done.stdout.strip(), re.MULTILINE)
        if not found:
            raise LaunchError(
                f"{self.submit[0]} did not print the job's number, but {answer!r}; "
                "check whether it is queued"
            )
        return found[1]

    def job_state(self, job: str, environment: Mapping[str, str]) -> str | None:
        """Ask for the state of a job, in the system's own words (PENDING, RUNNING, DONE …).

        Returns None where nothing answers. Each query takes at most QUESTION_SECONDS.
        """
        for query in self.queries:
            words = [word.format(job=job) for word in query.command]
            answer = self._answer_of(words, query.pattern, environment)
            if answer:
                return self.state_words.get(answer, answer)
        return None

    def is_over(self, state: str) -> bool:
        """Return whether a job in this state will never run again by itself."""
        return state in self.over

    def hosts(self, environment: Mapping[str, str]) -> list[str]:
        """Return the hosts of the allocation around this process, each once; [] outside of one."""
        try:
            path = Path(environment[self.hosts_variable])
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        except (KeyError, OSError):
            return []
        # An LSF file names the submission host too; its line is a host's like the others.
        return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))

    def _answer_of(
        self, words: Sequence[str], pattern: str, environment: Mapping[str, str]
    ) -> str | None:
        program = find_program(words[0], environment)
        if program is None:
            return None
        done = run_program([program, *words[1:]], environment, QUESTION_SECONDS)
        if done is None or done.returncode:
            return None
        found = re.search(pattern, done.stdout, re.MULTILINE)
        return found[1] if found else None


def find_program(program: str, environment: Mapping[str, str]) -> str | None:
    """Return the path of a command of a batch system; None where it is not on PATH."""
    return shutil.which(program, path=environment.get("PATH", ""))


def run_program(
    words: Sequence[str],
    environment: Mapping[str, str],
    seconds: float,
    folder: str | None = None,
    script: str | None = None,
) -> "subprocess.CompletedProcess[str] | None":
    """Run a command of a batch system; return None after `seconds`. Raises LaunchError."""
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
