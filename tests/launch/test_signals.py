"""Signals are recorded from the start, and end the process only with nothing to save."""

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys
from contextlib import nullcontext
from mpillm.launch.signals import StopSignals
signals = StopSignals()
with signals.orderly() if sys.argv[2] == "orderly" else nullcontext():
    for number in sys.argv[1].split(","):
        os.kill(os.getpid(), int(number))
newest = [signals.newest] if signals.newest != signals.number else []
print("went on with", signals.number, *newest)
"""


def run(when: str, *numbers: int) -> "subprocess.CompletedProcess[str]":
    words = ",".join(str(int(number)) for number in numbers)
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, words, when], text=True, capture_output=True, check=False
    )


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGURG])
@pytest.mark.parametrize("when", ["early", "orderly"])
def test_a_notice_never_ends_the_process(when: str, number: int) -> None:
    assert run(when, number).stdout == f"went on with {int(number)}\n"


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU])
def test_an_end_is_put_off_while_there_is_something_to_save(number: int) -> None:
    assert run("orderly", number).stdout == f"went on with {int(number)}\n"
    early = run("early", number)
    assert early.stdout == ""
    assert "KeyboardInterrupt" in early.stderr


@pytest.mark.usefixtures("processes")
def test_the_first_signal_counts_and_a_second_ctrl_c_ends() -> None:
    # And the last one next to it.
    came = run("orderly", signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    assert came.stdout == "went on with 10 2\n"
    assert run("orderly", signal.SIGTERM, signal.SIGTERM).stdout == "went on with 15\n"
    assert "KeyboardInterrupt" in run("orderly", signal.SIGINT, signal.SIGINT).stderr
