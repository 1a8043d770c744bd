import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest


@pytest.fixture
def interrupted() -> Callable[[str], str]:
    """What a Python script that prints `waiting` and then waits has on stderr, once it is sent SIGINT."""

    def run(script: str) -> str:
        waiting = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        waiting.send_signal(signal.SIGINT)
        _, told = waiting.communicate(timeout=20)
        return told

    return run
