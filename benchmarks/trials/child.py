"""Run a verb in a forked child, as a user would type it, and judge how it ended.

The parent has imported everything but MPI, so a trial costs no imports and starts at once.
"""

import importlib
import os
import pkgutil
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mpillm.system.ending_signals import ENDING, leave_on_signals

# The exit codes of docs/reliability.md.
CODES = {0, 1, 2, 3, 75, 130}
LIMIT_SECONDS = 120.0
# Words that only Python says. `Error` alone is also a heading of a usage message.
BARE = re.compile(
    r"Traceback \(most recent|a fault of mpillm itself|\[Errno|Exception ignored"
    r"|\b(?:Runtime|Overflow|Memory|Key|Type|Index|Attribute|Value|OS|Recursion|Assertion|EOF"
    r"|Unicode\w*|FileNotFound|Permission|IsADirectory|NotADirectory|BrokenPipe|ZeroDivision)"
    r"(?:Error|Exception)\b"
)
# A file that is being written; nothing of this form may stay after an end.
TEMPORARY = re.compile(r"\..*\b(tmp|partial|prepare|trash|left|old|unfinished)\b.*")


@dataclass
class Outcome:
    """How a verb ended: exit code (negative: died of that signal), output, and its faults."""

    words: tuple[str, ...]
    code: int = 0
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    hung: bool = False
    faults: list[str] = field(default_factory=list)

    @property
    def says(self) -> str:
        return next((line for line in reversed(self.err.splitlines()) if line.strip()), "")[:300]


def preload() -> None:
    """Import every module of mpillm and what it uses late, but for MPI itself."""
    for name in (
        "torch",
        "h5py",
        "tokenizers",
        "pydantic",
        "jinja2",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "tensorboard.summary.writer.event_file_writer",
    ):
        importlib.import_module(name)
    import mpillm

    for module in pkgutil.walk_packages(mpillm.__path__, "mpillm."):
        if not module.name.endswith(("_child", "__main__")):
            # What a GPU needs is absent on most machines.
            with suppress(ImportError):
                importlib.import_module(module.name)
    if "mpi4py.MPI" in sys.modules:
        raise SystemExit("a module of mpillm loads MPI when it is imported; a fork would break it")


class Running:
    """A verb that runs in a child of its own, with `folder` as its current folder."""

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        limits: Callable[[], None] | None = None,
        launcher: Sequence[str] = (),
    ) -> None:
        self.outcome, self._began = Outcome(tuple(words)), time.monotonic()
        self.scratch = folder / f".scratch-{os.getpid()}-{time.monotonic_ns()}"
        (self.scratch / "tmp").mkdir(parents=True)
        sys.stdout.flush()
        # Not before the verb has its handlers: until then it would be Python's start that ends.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        self.pid = os.fork()
        if not self.pid:
            _be_the_verb(words, folder, self.scratch, limits, launcher)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)

    def send(self, number: int) -> None:
        """Send a signal to the verb; SIGKILL to its ranks too, where a launcher started it."""
        for pid in session(self.pid) if number == signal.SIGKILL else [self.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds: float = LIMIT_SECONDS) -> Outcome:
        """Wait for the end; kill and report a verb that takes longer than `seconds`."""
        done, end = self.outcome, time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > end:
                done.hung = True
                self.send(signal.SIGKILL)
                _, status = os.waitpid(self.pid, 0)
                break
            time.sleep(0.01)
        for pid in session(self.pid):  # a launcher's ranks
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        done.code, done.seconds = os.waitstatus_to_exitcode(status), time.monotonic() - self._began
        done.out = (self.scratch / "out").read_text(encoding="utf-8", errors="replace")
        done.err = (self.scratch / "err").read_text(encoding="utf-8", errors="replace")
        done.faults = _faults(done)
        self.left = (
            [] if done.code < 0 else sorted(path.name for path in (self.scratch / "tmp").iterdir())
        )
        shutil.rmtree(self.scratch, ignore_errors=True)
        return done


def run_verb(
    words: Sequence[str],
    folder: Path,
    limits: Callable[[], None] | None = None,
    launcher: Sequence[str] = (),
) -> Outcome:
    """Run a verb to its end. What it leaves in TMPDIR counts as a fault."""
    running = Running(words, folder, limits, launcher)
    done = running.wait()
    if running.left:
        done.faults.append(f"left in TMPDIR: {running.left[:3]}")
    return done


def session(leader: int) -> list[int]:
    """List the living processes of a session: a launcher puts ranks into groups of their own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                fields = (entry / "stat").read_text(encoding="ascii", errors="replace")
                state, *rest = fields.rpartition(")")[2].split()
                if int(rest[2]) == leader and state not in ("Z", "X"):
                    found.append(int(entry.name))
    return found


def temporary_files(folder: Path) -> list[str]:
    """List what looks like an unfinished file below `folder`."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob(".*")
        if TEMPORARY.fullmatch(path.name) and not path.name.startswith(".scratch-")
    )


def _faults(done: Outcome) -> list[str]:
    found = []
    if done.hung:
        found.append(f"hung: {' '.join(done.words)}")
    elif done.code < 0:
        found.append(f"died of signal {-done.code}")
    elif done.code not in CODES:
        found.append(f"exit code {done.code} is not in the table")
    # A value that the user typed may hold any word, and is repeated in the message.
    said = done.err
    for word in done.words:
        said = said.replace(word, "") if len(word) > 3 else said
    if "--debug" in done.words:
        # The traceback was asked for.
        said = "\n".join(line for line in said.splitlines() if line.startswith("mpillm: "))
    if bare := BARE.search(said):
        found.append(f"bare {bare.group()!r}: {done.says}")
    # An interrupt while a verb is loaded leaves quietly.
    if done.code > 0 and done.code != 130 and not (done.err + done.out).strip():
        found.append(f"exit code {done.code} without a word")
    return found


def _be_the_verb(
    words: Sequence[str],
    folder: Path,
    scratch: Path,
    limits: Callable[[], None] | None,
    launcher: Sequence[str],
) -> None:
    """Become `mpillm WORDS`; never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ["TMPDIR"] = str(scratch / "tmp")
        # Ranks that are killed leave what their MPI library put into /dev/shm: not ours to remove.
        for name in ("btl_vader", "btl_sm"):
            os.environ[f"OMPI_MCA_{name}_backing_directory"] = str(scratch / "tmp")
        for number, name, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, str(scratch / "out"), os.O_WRONLY | os.O_CREAT),
            (2, str(scratch / "err"), os.O_WRONLY | os.O_CREAT),
        ):
            os.dup2(os.open(name, flags, 0o600), number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        if limits is not None:
            limits()
        leave_on_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        if launcher:
            os.execvp(launcher[0], [*launcher, sys.executable, "-m", "mpillm", *words])
        code = _call_main(words)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _call_main(words: Sequence[str]) -> int:
    import atexit

    from mpillm.__main__ import main

    sys.argv = ["mpillm", *words]
    code: object = 0
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    # What a process does at its end, before Python itself is gone.
    atexit._run_exitfuncs()
    mpi = getattr(sys.modules.get("mpi4py"), "MPI", None)
    if mpi and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    return int(code or 0)
