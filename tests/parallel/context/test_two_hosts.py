"""Rings between hosts: the serial pass starts their tests again on two hosts made of namespaces."""

import os
import sysconfig
from pathlib import Path

import pytest

FIXTURE = Path(__file__).parents[2] / "fixtures" / "two_hosts.sh"
UNAVAILABLE = 77
START = "import os, sys; os.execvp('sh', ['sh', *sys.argv[1:]])"


@pytest.mark.multihost
def test_rings_on_two_hosts_of_two_ranks(python):
    def on_two_hosts(*command):
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        return python("-c", START, FIXTURE, "--ranks-per-host", "2", *command, PATH=path)

    # Not `true`: Open MPI's mpirun can wait endlessly for processes that end at once.
    tried = on_two_hosts("sleep", "1")
    if tried.returncode == UNAVAILABLE:
        pytest.skip(tried.stderr.strip().splitlines()[-1])
    assert tried.returncode == 0, tried.stdout + tried.stderr
    tests = Path(__file__).with_name("test_ring_attention.py")
    done = on_two_hosts("python", "-m", "pytest", "-q", "--color=no", tests, "-k", "shared")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
