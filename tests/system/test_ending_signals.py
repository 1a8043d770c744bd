"""Ctrl-C and SIGTERM at any time: no traceback, exit code 130, and no file left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpillm.system.ending_signals import deferred_signals
from tests.conftest import Run, clean_environment

pytestmark = pytest.mark.usefixtures("processes")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", [("bench", "gemm", "--iterations", "100000"), ("doctor",)])
@pytest.mark.parametrize("seconds", [0, 0.3, 0.8])
def test_a_signal_ends_a_verb_quietly(
    tmp_path: Path, number: signal.Signals, words: tuple[str, ...], seconds: float
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mpillm", *words],
        env=clean_environment(TMPDIR=str(tmp_path)),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    # From mpillm's first line on: Python itself catches no SIGTERM.
    while not _caught(process.pid) >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def _caught(process: int) -> int:
    """Return the mask of the signals that a process catches."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("SigCgt:")).split()[1], 16)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_deferred_signal_comes_after_the_block(number: signal.Signals) -> None:
    came, before = [], signal.getsignal(number)
    signal.signal(number, lambda number, frame: came.append(number))
    try:
        with deferred_signals():
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            assert came == []
        assert came == [number]
    finally:
        signal.signal(number, before)


def test_an_ignored_signal_stays_ignored() -> None:
    """As nohup and a shell's background jobs leave it."""
    code = (
        "import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from mpillm.system.ending_signals import leave_on_signals, interrupt_on_signals\n"
        "leave_on_signals()\nos.kill(os.getpid(), signal.SIGINT)\ninterrupt_on_signals()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL\nprint('here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout == "here\n"


INTERRUPTED_DESTRUCTOR = """
import sys
from mpillm.system.ending_signals import interrupt_on_signals

class Part:
    def __del__(self):
        raise KeyboardInterrupt

interrupt_on_signals()
try:
    part = Part()
    del part
    while True:
        pass
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
"""


@pytest.mark.usefixtures("processes")
def test_an_interrupt_within_a_destructor_is_not_forgotten(python: Run) -> None:
    assert python("-c", INTERRUPTED_DESTRUCTOR, timeout=60).stderr == "interrupted\n"


INTERRUPTED_LIBRARY = """
import os, signal
from mpillm.comm.failure import fail_together
from mpillm.system.ending_signals import interrupt_on_signals

interrupt_on_signals()
with fail_together(None):
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        while True:
            pass
    except KeyboardInterrupt:
        # As compiled code whose call into Python fails.
        raise TypeError("cannot convert an array") from None
"""


@pytest.mark.usefixtures("processes")
def test_an_interrupt_that_a_library_hides_is_one(python: Run) -> None:
    done = python("-c", INTERRUPTED_LIBRARY, timeout=60)
    assert (done.returncode, done.stderr) == (130, "mpillm: interrupted: by SIGHUP\n")


INTERRUPTED_DATACLASS = """
import sys
from mpillm.system.ending_signals import exit_by_code

try:
    # As the making of a dataclass, which an interrupt may meet.
    exec("raise KeyboardInterrupt")
except KeyboardInterrupt:
    pass
if sys.argv[1:]:
    exit_by_code()
sys.exit(130)
"""


@pytest.mark.parametrize(("words", "code"), [((), -signal.SIGINT), (("cleared",), 130)])
def test_a_handled_interrupt_leaves_the_exit_code(
    tmp_path: Path, words: tuple[str, ...], code: int
) -> None:
    (tmp_path / "interrupted.py").write_text(INTERRUPTED_DATACLASS)
    environment = clean_environment()
    path = f"{tmp_path}{os.pathsep}{environment.get('PYTHONPATH') or Path.cwd()}"
    done = subprocess.run(
        [sys.executable, "-m", "interrupted", *words],
        env={**environment, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == code
