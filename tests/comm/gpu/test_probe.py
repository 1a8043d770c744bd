"""The probe of GPU memory in MPI: children that answer, crash, hang, or can't start."""

import os
import sys
import time

import pytest

from mpillm.comm.gpu.probe import CHILD, TRIALS, probe
from mpillm.system.environment import without_launcher

pytestmark = pytest.mark.usefixtures("processes")
ON_THE_CPU = (*CHILD[:-1], "cpu")
NOTHING = dict.fromkeys(TRIALS, False)


def child(script):
    """Make the command of a child with the trials in `names` and `answer` for its lines."""
    head = (
        "import os, sys, time\nnames = sys.argv[1:]\n"
        "answer = lambda text: print(text, flush=True)\n"
    )
    return (sys.executable, "-c", head + script)


def test_the_real_child_on_the_cpu():
    """The trials themselves are right: each succeeds on CPU memory, which every MPI takes."""
    assert probe(os.environ, child=ON_THE_CPU) == dict.fromkeys(TRIALS, True)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_real_child_as_a_job(python, ranks):
    answers = python(
        "-m", "mpillm.comm.gpu.probe_child", "cpu", *TRIALS, ranks=ranks
    ).stdout.splitlines()
    assert answers == ["ready", *(f"{name} ok" for name in TRIALS)]


def test_without_a_gpu_every_trial_fails():
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount():
            pytest.skip("there is a GPU")
    except Exception:
        pass
    assert probe(os.environ) == NOTHING


@pytest.mark.parametrize(
    "script",
    [
        "os.abort()",
        "import ctypes; ctypes.string_at(0)",
        "sys.exit(3)",
        "answer('what?')",
        "answer('ready'); os.abort()",
    ],
)
def test_a_child_that_crashes_found_nothing(script):
    assert probe(os.environ, child=child(script)) == NOTHING


def test_a_child_that_cannot_be_started():
    assert probe(os.environ, child=("/no/such/program",)) == NOTHING


def test_a_child_that_hangs_is_ended():
    began = time.monotonic()
    assert (
        probe(
            os.environ,
            child=child("answer('ready'); time.sleep(600)"),
            child_seconds=0.3,
            all_seconds=1,
        )
        == NOTHING
    )
    assert time.monotonic() - began < 30


def test_another_child_continues_after_a_crash_and_after_a_hang():
    script = (
        "answer('ready')\n"
        "for name in names:\n"
        "    if name == 'allreduce': os.abort()\n"
        "    if name == 'alltoall': time.sleep(600)\n"
        "    answer(name + (' wrong' if name == 'reduce' else ' ok'))\n"
    )
    found = probe(os.environ, child=child(script), child_seconds=2)
    assert found == {name: name not in ("allreduce", "alltoall", "reduce") for name in TRIALS}


def test_a_child_is_in_no_job():
    job = {
        "OMPI_COMM_WORLD_RANK": "1",
        "PMIX_RANK": "1",
        "SLURM_JOB_ID": "7",
        "PMI_RANK": "1",
        "HYDI_CONTROL_FD": "5",
    }
    own = {
        "PATH": "/bin",
        "OMPI_MCA_btl": "self",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "UCX_TLS": "cuda",
        "FI_PROVIDER": "x",
    }
    assert without_launcher(job | own) == own
