import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest


@pytest.fixture
def interrupted() -> Callable[[str], str]:
    """Return a call: run a Python script that prints `waiting` and waits, send it SIGINT, give its
    stderr.
    """

    def run(script: str) -> str:
        waiting = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Under a background job of a shell SIGINT is ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        waiting.send_signal(signal.SIGINT)
        try:
            _, text = waiting.communicate(timeout=20)
        finally:
            # A script that did not end would spin on.
            waiting.kill()
        return text

    return run
