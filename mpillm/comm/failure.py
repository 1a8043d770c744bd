"""Fail together: one rank's failure ends the job with its reason and never leaves the others
waiting.

A rank that fails asks whether all ranks failed, by a non-blocking barrier on a communicator of its
own that healthy ranks never join. If all came (a wrong path, a typo in a recipe), rank 0 prints one
message and all exit. If some did not (they wait in a collective, or are done), this rank prints the
reason and calls MPI_Abort, which ends all.
"""

import os
import re
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from mpillm.comm.waiting import patient_barrier, patient_bcast, wait_patiently
from mpillm.errors import DataError, MpillmError
from mpillm.system.ending_signals import ENDING, INTERRUPTED, interrupt_that_came
from mpillm.system.messages import NO_MEMORY, explain, printable
from mpillm.system.shadowing import explain_hidden, hidden_packages

if TYPE_CHECKING:
    from mpi4py import MPI

# Long enough for ranks that find the same fault one after the other on a slow file system.
AGREEMENT_SECONDS = 2.0
# On a busy host the launcher may end itself before it has forwarded the message: this long it may
# take.
FORWARDING_SECONDS = 0.5
# The first word of a message, kept ahead of the ranks, so that a log can be searched for it.
KINDS = ("error", "stopped")
# A typed value of thousands of letters must not hide the message around it.
LONG_WORD, SHOWN_LETTERS = re.compile(r"\S{1000,}"), 200

# The folder of mpillm's own files.
OURS = f"{Path(__file__).parents[1]}{os.sep}"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Reason:
    """Why a rank leaves: the `text` to print ("" where all is printed), the exit `code`, the
    `trace` for --debug.
    """

    text: str
    code: int
    trace: str = ""


@contextmanager
def fail_together(comm: "MPI.Intracomm | None", *, debug: bool = False) -> Iterator[None]:
    """Run the block; when it raises, print the reason to stderr and leave through SystemExit or
    MPI_Abort.

    Every rank of `comm` enters it (it duplicates the communicator); None means a process without
    MPI. `debug` prints tracebacks. An exit with code 0 (SystemExit, typer.Exit) passes through
    untouched. Exit codes: MpillmError's own (75 for a run that was asked to stop), 130 when
    interrupted, 1 otherwise.
    """
    private = comm.Dup() if comm is not None and comm.size > 1 else None
    try:
        yield
    except BaseException as failure:
        if exit_code(failure) == 0:
            raise
        _ignore_interrupts()
        _leave(private, reason_of(_meant(failure)), debug)
    # Free is collective, so it is called only after success; if a rank failed, its Abort ends a
    # wait in here.
    if private is not None:
        private.Free()


def on_root(
    comm: "MPI.Intracomm",
    work: Callable[[], Result],
    describe: Callable[[OSError], str] = explain,
) -> Result:
    """Run `work` on rank 0 and give its picklable result, or its MpillmError, to every rank.

    Every rank of `comm` calls it; the others sleep meanwhile. So a mistake that rank 0 finds is
    raised on all ranks alike. An OSError becomes a DataError with the words of `describe`.
    """
    outcome = _attempt(work, describe) if comm.rank == 0 else (None, None)
    result, failure = patient_bcast(comm, outcome)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def _attempt(
    work: Callable[[], Result], describe: Callable[[OSError], str]
) -> tuple[Result | None, MpillmError | None]:
    """Run `work`; return its result, or its error for other ranks to raise too."""
    try:
        return work(), None
    except MpillmError as failure:
        return None, failure
    except OSError as failure:
        return None, DataError(describe(failure))


def on_all(
    comm: "MPI.Intracomm",
    work: Callable[[], Result],
    describe: Callable[[OSError], str] = explain,
) -> Result:
    """Run `work` on every rank and return its result; raise the first failing rank's error on all.

    Every rank of `comm` calls it, and `work` does not communicate. An OSError becomes a DataError
    with the words of `describe`. So no rank waits for one that failed, and one of them can tidy up
    when no other still writes.
    """
    result, failure = _attempt(work, describe)
    patient_barrier(comm)
    failures = [found for found in comm.allgather(failure) if found is not None]
    if failures:
        raise failures[0]
    return result  # type: ignore[return-value]


def exit_code(failure: BaseException) -> int:
    """Return the process's exit code for an exception."""
    if isinstance(failure, SystemExit):
        return failure.code if isinstance(failure.code, int) else int(failure.code is not None)
    if isinstance(failure, KeyboardInterrupt):
        return INTERRUPTED
    named = isinstance(failure, MpillmError) or is_typer_exit(failure)
    return int(getattr(failure, "exit_code", 1)) if named else 1


def _meant(failure: BaseException) -> BaseException:
    """Return the interrupt where `failure` is what foreign code has made of it."""
    named = isinstance(failure, MpillmError) or is_typer_exit(failure)
    if isinstance(failure, Exception) and not named:
        return interrupt_that_came() or failure
    return failure


def is_typer_exit(failure: BaseException) -> bool:
    """Recognize typer.Exit by its shape, so that comm need not load typer."""
    return type(failure).__name__ == "Exit" and isinstance(getattr(failure, "exit_code", None), int)


def reason_of(failure: BaseException) -> Reason:
    """Write the message for an exception: mpillm's own errors hold the remedy, others name their
    type.
    """
    text, code = str(failure), exit_code(failure)
    if is_typer_exit(failure) or (
        isinstance(failure, SystemExit) and not isinstance(failure.code, str)
    ):
        # Code that exits with a bare number has printed its message already.
        return Reason("", code)
    if isinstance(failure, KeyboardInterrupt):
        return Reason(f"interrupted: {text}" if text else "interrupted", code)
    if isinstance(failure, OSError):
        text = explain(failure)
    elif isinstance(failure, MemoryError):
        # Its second argument, where there is one, is the remedy.
        what, *remedies = failure.args or ("",)
        remedy = remedies[0] if remedies else "use a smaller job or more nodes"
        text = f"out of memory{f' ({what})' if what else ''}; {remedy}"
    elif not isinstance(failure, MpillmError | SystemExit):
        text = _foreign_text(failure)
    trace = "".join(traceback.format_exception(failure))
    return Reason(f"{getattr(failure, 'kind', 'error')}: {text}", code, trace)


def _foreign_text(failure: BaseException) -> str:
    """Explain an exception that mpillm does not raise: memory, MPI, a hidden package, a plug-in, or
    our fault.
    """
    name, text = type(failure).__name__, str(failure)
    if NO_MEMORY.search(text):
        return f"out of memory ({text.splitlines()[0]}); use a smaller job or more nodes"
    if _is_of_mpi(failure):
        return (
            f"MPI failed: {text or name}; another rank may have died, or the network failed: read "
            "the messages of the other ranks and the scheduler's log, then start again"
        )
    hidden, remedy = explain_hidden(hidden_packages())
    if hidden:
        return f"{hidden} ({name}: {text}); {remedy}"
    words = f"{name}: {text}" if text else name
    if module := _module_of_a_plugin(failure):
        return f"a fault in {module}: {words}; correct that module (--debug shows where)"
    return f"a fault of mpillm itself: {words}; please report it with the output of --debug"


def _is_of_mpi(failure: BaseException) -> bool:
    """Recognize mpi4py's own exception, without loading MPI."""
    loaded = sys.modules.get("mpi4py.MPI")
    return loaded is not None and isinstance(failure, loaded.Exception)


def _module_of_a_plugin(failure: BaseException) -> str:
    """Return the user's own module that raised `failure`; "" where mpillm did.

    Innermost first: packages and Python's library raise for their caller.
    """
    paths = sysconfig.get_paths()
    packages = {f"{paths[key]}{os.sep}" for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    for frame, _ in reversed(list(traceback.walk_tb(failure.__traceback__))):
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            return ""
        if not (file.startswith(("<", *packages)) or "site-packages" in file):
            return f"the module {frame.f_globals.get('__name__')} ({file})"
    return ""


def _leave(private: "MPI.Intracomm | None", reason: Reason, debug: bool) -> NoReturn:
    """Print the reason and leave, with all ranks if all failed, else by MPI_Abort."""
    if private is None:
        _print(message([reason], debug))
    elif wait_patiently(private.Ibarrier(), AGREEMENT_SECONDS):
        reasons = private.allgather(reason)
        if private.rank == 0:
            _print(message(reasons, debug))
        # A launcher kills the rest once a rank leaves with an error: no rank may leave before the
        # message is out.
        private.Barrier()
        private.Free()
    else:
        _print(lone_message(reason, private.rank, private.size, host_name(), debug))
        time.sleep(FORWARDING_SECONDS)
        from mpi4py import MPI

        # The world, not its duplicate: for that, MPICH's launcher sometimes replaces the exit code
        # by its own.
        MPI.COMM_WORLD.Abort(reason.code)
    raise SystemExit(reason.code)


def message(reasons: Sequence[Reason], debug: bool = False) -> str:
    """Write the message of rank 0 when all ranks failed: each different reason once, with its
    ranks.
    """
    groups: dict[str, list[int]] = {}
    for rank, reason in enumerate(reasons):
        groups.setdefault(reason.text, []).append(rank)
    if len(groups) == 1:
        return _line(reasons[0], "", debug) if reasons[0].text else ""
    return "".join(
        _line(reasons[ranks[0]], f"{ranks_text(ranks)} of {len(reasons)}: ", debug)
        for ranks in groups.values()
    )


def lone_message(reason: Reason, rank: int, size: int, host: str, debug: bool = False) -> str:
    """Write the message of a rank that fails while others continue."""
    return _line(reason, f"rank {rank} of {size} ({host}): ", debug)


def _line(reason: Reason, who: str, debug: bool) -> str:
    """Write `mpillm: error: rank 2 of 4: what`: the kind first, so that a log can be searched for
    it.
    """
    words = reason.text or f"error: left with exit code {reason.code}"
    kind, _, rest = words.partition(": ")
    if who:
        words = f"{kind}: {who}{rest}" if kind in KINDS else f"error: {who}{words}"
    line = printable(f"mpillm: {LONG_WORD.sub(_shortened, words)}\n")
    return reason.trace + line if debug else line


def _shortened(found: "re.Match[str]") -> str:
    return found.group()[:SHOWN_LETTERS] + "…"


def ranks_text(ranks: Sequence[int]) -> str:
    """Write [0] as `rank 0`, [1, 2, 3, 7] as `ranks 1–3, 7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def host_name() -> str:
    """Return this host's name as MPI reports it."""
    from mpi4py import MPI

    return MPI.Get_processor_name()


def _print(text: str) -> None:
    """Print in one write, flushed: MPI_Abort ends the process without Python's own flushing."""
    # Either may be a closed pipe or a full disk, which must not hide the reason or its exit code.
    with suppress(OSError):
        sys.stdout.flush()
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _ignore_interrupts() -> None:
    """Ignore what asks for an end (SIGINT, SIGTERM, …) for the rest of this process's short life.

    A second Ctrl-C would print a traceback over the reason, or keep this rank from the others. So
    would the SIGTERM that launchers send once another rank has left.
    """
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
