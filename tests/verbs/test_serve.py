"""`mpillm serve` as a user starts it: in a job of two ranks, and with what it refuses."""

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpillm.errors import UsageError
from mpillm.infer.serve.http.bearer_tokens import BearerTokens
from mpillm.infer.serve.http.listening import ListeningOptions, open_listener
from mpillm.verbs.serve import Serve
from tests.conftest import clean_environment, mpirun_command
from tests.infer.serve.http.served import publish_chat
from tests.launch.test_batch_script import shellcheck

pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("processes")
SCRIPT = Path(__file__).parents[2] / "jobs" / "serve.sh"


def test_the_script_of_a_batch_job_passes_shellcheck() -> None:
    assert shellcheck([SCRIPT]) == ""
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs a run to serve" in done.stderr


def test_a_job_of_two_ranks_serves_and_drains(tmp_path: Path) -> None:
    """By the script of a batch job; the end of the job is asked for by SIGUSR1."""
    run, out = publish_chat(tmp_path), tmp_path / "out"
    extra = {
        "MPILLM_SERVE": f"{run} --port 0 --served-model-name small",
        "MPILLM_LAUNCH": " ".join(mpirun_command(2)),
        # As in a job of Slurm that was submitted elsewhere.
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_HOST": "login1",
    }
    with out.open("w") as file:
        job = subprocess.Popen(
            ["bash", SCRIPT],
            env=clean_environment(**extra),
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        until(lambda: "from your machine" in out.read_text() or job.poll() is not None, 120)
        text = out.read_text()
        assert "serving small with a context of 128 tokens" in text, text
        url = re.findall(r"a page to talk to it: (http://127.0.0.1:\d+)/", text)[0]
        port = url.rpartition(":")[2]
        assert f"ssh -N -L {port}:127.0.0.1:{port} -J login1" in text
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        head = {"Content-Type": "application/json"}
        asked = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), head
        )
        with urllib.request.urlopen(asked) as answer:
            assert json.loads(answer.read())["usage"]["completion_tokens"] <= 4
        os.kill(job.pid, signal.SIGUSR1)
        until(lambda: job.poll() is not None, 120)
        assert job.returncode == 75, out.read_text()
        text = out.read_text()
        assert "SIGUSR1: draining, 0 requests to finish" in text
        assert text.count("the server has drained") == 1
        assert "Traceback" not in text
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def test_a_port_in_use_is_one_message_ahead_of_the_weights(mpillm: Callable[..., Any]) -> None:
    with open_listener(ListeningOptions(port=0)) as taken:
        port = str(taken.getsockname()[1])
        done = mpillm("serve", "no-such-run", "--port", port)
    assert done.returncode == 2
    assert done.stderr.count("Address already in use") == 1
    assert "take another --port" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_new_token_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens"
    Serve(new_token="anna", tokens=file, days=1).run()
    token = capsys.readouterr().out.strip()
    assert BearerTokens(file).check(f"Bearer {token}").name == "anna"
    assert token not in file.read_text()


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a RUN"):
        Serve()
    with pytest.raises(UsageError, match="--tokens FILE"):
        Serve(new_token="anna")
    with pytest.raises(UsageError, match="--new-token NAME"):
        Serve(tmp_path, days=3)
    with pytest.raises(UsageError, match="visible characters"):
        Serve(tmp_path, served_model_name=("",))


def until(true: Callable[[], Any], seconds: float) -> None:
    """Wait, and let the caller say what is missing."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
