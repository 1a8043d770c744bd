"""Leaving together, under a real mpirun: if any rank fails, the job ends within seconds with one
reason.
"""

import errno
import os
import time
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.comm.failure import (
    Reason,
    exit_code,
    lone_message,
    message,
    on_all,
    on_root,
    ranks_text,
    reason_of,
)
from mpillm.errors import DataError, LayoutError, MpillmError, UsageError

SCRIPT = """
import os, signal, sys, time
import numpy
from mpillm.comm.failure import fail_together, on_root
from mpillm.comm.world import open_world
from mpillm.errors import MpillmError, UsageError

comm = open_world()
with fail_together(comm, debug="--debug" in sys.argv):
{body}
print("went on", comm.rank, flush=True)
"""


@pytest.fixture
def leave(folder, python):
    """Run `body` under fail_together; return its outputs and exit code, and its seconds."""

    def run(body, *arguments, ranks=2):
        script = Path(folder) / "script.py"
        script.write_text(
            SCRIPT.format(body="\n".join("    " + line for line in body.splitlines()))
        )
        started = time.monotonic()
        done = python(
            script, *arguments, ranks=ranks, timeout=60, PYTHONPATH=str(Path(__file__).parents[2])
        )
        return done, time.monotonic() - started

    return run


def ours(done):
    """Return the lines of stderr that are ours; a launcher adds its own."""
    return [line for line in done.stderr.splitlines() if line.startswith("mpillm:")]


def test_reasons_by_kind():
    assert reason_of(LayoutError("a")) == Reason("error: a", 2, reason_of(LayoutError("a")).trace)
    fault, report = (
        "error: a fault of mpillm itself:",
        "please report it with the output of --debug",
    )
    assert reason_of(KeyError("k")).text == f"{fault} KeyError: 'k'; {report}"
    assert reason_of(AssertionError()).text == f"{fault} AssertionError; {report}"
    assert reason_of(MemoryError()).text == "error: out of memory; use a smaller job or more nodes"
    named = reason_of(MemoryError("2 GiB were asked for", "lower x")).text
    assert named == "error: out of memory (2 GiB were asked for); lower x"
    full = OSError(errno.ENOSPC, "No space left on device", "/scratch/a\x1b[2J")
    assert reason_of(full).text.startswith(
        "error: /scratch/a\x1b[2J: No space left on device; free "
    )
    assert message([reason_of(full)]).startswith("mpillm: error: /scratch/a\\x1b[2J: No space left")
    assert reason_of(KeyboardInterrupt()) == Reason("interrupted", 130)
    assert reason_of(KeyboardInterrupt("saved step 7")).text == "interrupted: saved step 7"
    assert reason_of(SystemExit("words")).text == "error: words"
    assert reason_of(SystemExit(3)) == Reason("", 3)


def test_a_fault_is_of_the_code_that_raised_it(tmp_path, monkeypatch):
    """A user's plug-in, also through a package; mpillm; and MPI, where a rank has died."""
    (tmp_path / "my_plugin.py").write_text(
        "import numpy\n\n"
        "def ends():\n    raise KeyError('mine')\n\n"
        "def calls_a_package():\n    numpy.linalg.inv(numpy.zeros((2, 3)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_plugin

    def text_of(work):
        with pytest.raises(Exception) as raised:  # noqa: PT011
            work()
        return reason_of(raised.value).text

    place = f"error: a fault in the module my_plugin ({tmp_path / 'my_plugin.py'}): "
    assert text_of(my_plugin.ends) == (
        f"{place}KeyError: 'mine'; correct that module (--debug shows where)"
    )
    assert text_of(my_plugin.calls_a_package).startswith(f"{place}LinAlgError: ")
    # What on_root is given is no communicator: the fault shows in a file of mpillm.
    assert text_of(lambda: on_root(None, print)).startswith("error: a fault of mpillm itself: ")
    assert reason_of(MPI.Exception(MPI.ERR_PROC_FAILED)).text.startswith("error: MPI failed: ")
    assert "please report" not in reason_of(MPI.Exception(MPI.ERR_OTHER)).text


def test_exit_codes():
    class Exit(RuntimeError):
        exit_code = 0

    assert [exit_code(e) for e in (Exit(), SystemExit(), SystemExit(0), SystemExit("x"))] == [
        0,
        0,
        0,
        1,
    ]
    assert [
        exit_code(e) for e in (UsageError(), MpillmError(), KeyboardInterrupt(), OSError())
    ] == [
        2,
        1,
        130,
        1,
    ]


def test_messages():
    a, b = Reason("error: a", 1, "trace of a\n"), Reason("error: b", 2)
    assert message([a, a, a]) == "mpillm: error: a\n"
    assert (
        message([a, b, a]) == "mpillm: error: ranks 0, 2 of 3: a\nmpillm: error: rank 1 of 3: b\n"
    )
    assert message([Reason("", 2)] * 2) == ""
    assert message([a, Reason("", 2)]).endswith("rank 1 of 2: left with exit code 2\n")
    assert message([a], debug=True) == "trace of a\nmpillm: error: a\n"
    assert lone_message(a, 2, 4, "node7") == "mpillm: error: rank 2 of 4 (node7): a\n"
    assert ranks_text([1, 2, 3, 7]) == "ranks 1–3, 7"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_fail_alike(leave, ranks):
    done, seconds = leave("raise UsageError('no such file: x; give another')", ranks=ranks)
    assert done.returncode == 2
    assert ours(done) == ["mpillm: error: no such file: x; give another"]
    assert "Traceback" not in done.stderr
    assert seconds < 15


def test_all_fail_differently(leave):
    done, _ = leave("raise MpillmError('odd' if comm.rank % 2 else 'even')", ranks=3)
    assert done.returncode == 1
    assert ours(done) == ["mpillm: error: ranks 0, 2 of 3: even", "mpillm: error: rank 1 of 3: odd"]


@pytest.mark.parametrize(
    "others",
    [
        "comm.Allreduce(numpy.ones(4), numpy.ones(4))",
        "comm.recv(source=1)",
        "pass",
        "time.sleep(60)",
        "sys.exit(0)",
    ],
    ids=["in a collective", "in a receive", "done", "at work", "exited"],
)
def test_one_fails(leave, others):
    done, seconds = leave(f"if comm.rank == 1:\n    raise UsageError('one')\n{others}", ranks=3)
    assert done.returncode == 2
    (line,) = ours(done)
    assert line.startswith("mpillm: error: rank 1 of 3 (")
    assert line.endswith("): one")
    assert "Traceback" not in done.stderr
    assert seconds < 15


def test_unexpected_with_debug(leave):
    done, _ = leave("on_root(None, print)", "--debug")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert ours(done) == [
        "mpillm: error: a fault of mpillm itself: AttributeError: 'NoneType' object has no "
        "attribute 'rank'; please report it with the output of --debug"
    ]


def test_interrupt_everywhere_and_again(leave):
    # The second SIGINT comes 0.2 s after the first, on ranks that are telling it and wait for the
    # slowest.
    body = """
if os.fork() == 0:
    time.sleep(0.5)
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(0.2)
    os.kill(os.getppid(), signal.SIGINT)
    os._exit(0)
try:
    time.sleep(30)
finally:
    if comm.rank == 0:
        try:
            time.sleep(1.0)
        except KeyboardInterrupt:
            pass
"""
    done, seconds = leave(body, ranks=3)
    assert done.returncode == 130
    assert ours(done) == ["mpillm: interrupted"]
    assert "Traceback" not in done.stderr
    assert "went on" not in done.stdout
    assert seconds < 15


def test_interrupt_of_one(leave):
    body = (
        "if comm.rank == 0:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(9)\n"
        "comm.Barrier()"
    )
    done, _ = leave(body)
    assert done.returncode == 130
    (line,) = ours(done)
    assert line.endswith("): interrupted")


@pytest.mark.parametrize("ranks", [1, 2])
def test_success_goes_on(leave, ranks):
    done, _ = leave("comm.Barrier()", ranks=ranks)
    assert done.returncode == 0
    assert done.stdout.count("went on") == ranks
    assert done.stderr == ""


def test_clean_exit_passes(leave):
    done, _ = leave("sys.exit(0)")
    assert done.returncode == 0
    assert done.stdout + done.stderr == ""


def test_bare_exit_code_is_silent(leave):
    done, _ = leave("sys.exit(4)")
    assert done.returncode == 4
    assert ours(done) == []


@pytest.mark.parametrize("failing", [0, -1])
def test_a_failure_of_one_rank_is_raised_on_all(comm, failing):
    """Also the system's own: with its file and what to do."""
    failing %= comm.size

    def work():
        if comm.rank == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there")
        return comm.rank

    says = "there: No space left on device; free some space"
    with pytest.raises(DataError, match=says):
        on_all(comm, work)
    with pytest.raises(DataError, match="in other words"):
        on_all(comm, work, lambda failure: "in other words")
    if failing == 0:
        with pytest.raises(DataError, match=says):
            on_root(comm, work)
    assert on_all(comm, lambda: comm.rank) == comm.rank
