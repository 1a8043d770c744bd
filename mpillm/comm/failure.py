"""Failing together: one rank's failure ends the job with its reason and never leaves the others waiting.

A rank that fails asks whether all ranks failed, with a non-blocking barrier on a communicator of its own that
the healthy ranks never join. All came (a wrong path, a typo in a recipe): one message and an orderly exit.
Some did not (they wait in a collective, or are done): this rank says why and calls MPI_Abort, which ends all.
"""

import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from mpillm.comm.waiting import wait_patiently
from mpillm.errors import MpillmError

if TYPE_CHECKING:
    from mpi4py import MPI

# Long enough for ranks that meet the same fault one after the other on a slow file system.
AGREEMENT_SECONDS = 2.0
TELLING_SECONDS = 0.5
# Of reasons: the word that stays ahead of the ranks.
KINDS = ("error", "stopped")
INTERRUPTED = 130  # what a shell reports for a process ended by SIGINT: 128 + 2


@dataclass(frozen=True)
class Reason:
    """Why a rank leaves: `text` to print ("" where all is said), the exit `code`, the `trace` for --debug."""

    text: str
    code: int
    trace: str = ""


@contextmanager
def fail_together(comm: "MPI.Intracomm | None", *, debug: bool = False) -> Iterator[None]:
    """Run the block; when it raises, print the reason to stderr and leave through SystemExit or MPI_Abort.

    Every rank of `comm` enters it (it duplicates the communicator); `None` stands for a process without MPI.
    `debug` prints tracebacks. An exit with code 0 (SystemExit, typer.Exit) passes through untouched.
    Exit codes: MpillmError's own (75 for a run that was asked to stop), 130 when interrupted, 1 otherwise.
    """
    private = comm.Dup() if comm is not None and comm.size > 1 else None
    try:
        yield
    except BaseException as failure:
        if exit_code(failure) == 0:
            raise
        _ignore_interrupts()
        _leave(private, reason_of(failure), debug)
    # Collective, so only where all went well; where one rank failed, its Abort ends a wait in here.
    if private is not None:
        private.Free()


def exit_code(failure: BaseException) -> int:
    """The process's exit code for what was raised."""
    if isinstance(failure, SystemExit):
        return failure.code if isinstance(failure.code, int) else int(failure.code is not None)
    if isinstance(failure, KeyboardInterrupt):
        return INTERRUPTED
    named = isinstance(failure, MpillmError) or is_typer_exit(failure)
    return int(getattr(failure, "exit_code", 1)) if named else 1


def is_typer_exit(failure: BaseException) -> bool:
    """typer.Exit by its shape, so that comm need not load typer."""
    return type(failure).__name__ == "Exit" and isinstance(getattr(failure, "exit_code", None), int)


def reason_of(failure: BaseException) -> Reason:
    """What to tell the user: our own errors hold the way out, any other names its type and --debug."""
    text, code = str(failure), exit_code(failure)
    if is_typer_exit(failure) or (
        isinstance(failure, SystemExit) and not isinstance(failure.code, str)
    ):
        return Reason("", code)  # whoever exits with a bare code has spoken already
    if isinstance(failure, KeyboardInterrupt):
        return Reason(f"interrupted: {text}" if text else "interrupted", code)
    if not isinstance(failure, MpillmError | SystemExit):
        name = type(failure).__name__
        text = f"{name}: {text} (--debug shows where)" if text else f"{name} (--debug shows where)"
    trace = "".join(traceback.format_exception(failure))
    return Reason(f"{getattr(failure, 'kind', 'error')}: {text}", code, trace)


def _leave(private: "MPI.Intracomm | None", reason: Reason, debug: bool) -> NoReturn:
    """Tell the reason and leave, with all ranks if all failed, else by MPI_Abort."""
    if private is None:
        _print(message([reason], debug))
    elif wait_patiently(private.Ibarrier(), AGREEMENT_SECONDS):
        reasons = private.allgather(reason)
        if private.rank == 0:
            _print(message(reasons, debug))
        # A launcher kills the rest once a rank leaves with an error: none may leave before the words are out.
        private.Barrier()
        private.Free()
    else:
        _print(lone_message(reason, private.rank, private.size, host_name(), debug))
        # On a busy host the launcher may end itself before it has passed the words on.
        time.sleep(TELLING_SECONDS)
        from mpi4py import MPI

        # The world, and not its duplicate: of that, MPICH's launcher now and then gives an exit code of its own.
        MPI.COMM_WORLD.Abort(reason.code)
    raise SystemExit(reason.code)


def message(reasons: Sequence[Reason], debug: bool = False) -> str:
    """What the lowest rank prints when all failed: like reasons once, others each with their ranks."""
    groups: dict[str, list[int]] = {}
    for rank, reason in enumerate(reasons):
        groups.setdefault(reason.text, []).append(rank)
    if len(groups) == 1:
        return _told(reasons[0], "", debug) if reasons[0].text else ""
    return "".join(
        _told(reasons[ranks[0]], f"{ranks_text(ranks)} of {len(reasons)}: ", debug)
        for ranks in groups.values()
    )


def lone_message(reason: Reason, rank: int, size: int, host: str, debug: bool = False) -> str:
    """What a rank prints when it fails while others go on."""
    return _told(reason, f"rank {rank} of {size} ({host}): ", debug)


def _told(reason: Reason, who: str, debug: bool) -> str:
    """`mpillm: error: rank 2 of 4: what`: the kind first, so that a log can be searched for it."""
    words = reason.text or f"error: left with exit code {reason.code}"
    kind, _, rest = words.partition(": ")
    if who:
        words = f"{kind}: {who}{rest}" if kind in KINDS else f"error: {who}{words}"
    line = f"mpillm: {words}\n"
    return reason.trace + line if debug else line


def ranks_text(ranks: Sequence[int]) -> str:
    """[0] → `rank 0`, [1, 2, 3, 7] → `ranks 1–3, 7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def host_name() -> str:
    from mpi4py import MPI

    return MPI.Get_processor_name()


def _print(text: str) -> None:
    """One write, flushed: MPI_Abort ends the process without Python's own flushing."""
    with suppress(OSError):  # stdout may be a closed pipe; that must not hide the reason
        sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()


def _ignore_interrupts() -> None:
    """For the rest of this process's short life: a second Ctrl-C, or the SIGTERM that launchers send once another rank
    has left, would print a traceback over the reason, or keep this rank from the others.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
