"""A real Slurm for tests/launch: two nodes of three cores, by tests/fixtures/minicluster.py."""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

MINICLUSTER = Path(__file__).parents[1] / "fixtures" / "minicluster.py"
UNAVAILABLE = 77
# As Slurm counts: two ranks a node leave one for another job.
CPUS = 3
PATIENCE_SECONDS = 240.0
OVER = ("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
# All nodes are one machine: MPI must not use shared memory between them, and ranks that wait yield
# their core.
ONE_MACHINE = {
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "UCX_TLS": "tcp,self",
    "FI_PROVIDER": "tcp",
    "FI_TCP_IFACE": "eth0",
}

Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Slurm:
    """A cluster that is up."""

    folder: Path
    """Empty at first, seen by all nodes, and gone with the cluster."""
    python: Callable[..., Done]

    def cluster(self, verb: str, *arguments: str | Path, timeout: float = PATIENCE_SECONDS) -> Done:
        """`minicluster.py VERB`: exec, kill-node, start-node."""
        state = self.folder / "cluster"
        return self.python(
            MINICLUSTER, verb, "--state", state, *arguments, timeout=timeout, **ONE_MACHINE
        )

    def run(self, *command: str | Path, timeout: float = PATIENCE_SECONDS) -> Done:
        """Run a command on the head node, where jobs are submitted."""
        return self.cluster("exec", *command, timeout=timeout)

    def mpillm(self, *arguments: str | Path, timeout: float = PATIENCE_SECONDS) -> Done:
        """`mpillm ARGUMENTS…` on the head."""
        return self.run(sys.executable, "-m", "mpillm", *arguments, timeout=timeout)

    def job(self, number: str) -> dict[str, str]:
        """Return the facts of a job: JobState, Restarts, ExitCode, Reason …"""
        told = self.run("scontrol", "--oneliner", "show", "job", number)
        assert told.returncode == 0, told.stderr
        return dict(re.findall(r"(\S+?)=(\S*)", told.stdout))

    def wait_for_end(self, number: str) -> str:
        """Wait until a job is over; return its state."""
        self.wait_until(number, lambda: self.job(number)["JobState"] in OVER)
        return self.job(number)["JobState"]

    def wait_until(self, number: str, true: Callable[[], object]) -> None:
        """Wait until something is true that a job brings about. Fails where the job ends before."""
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            job = self.job(number)
            if true():
                return
            late = time.monotonic() > end
            assert not late, (
                f"waited {PATIENCE_SECONDS:g} s for job {number}: {job}\n{self.outputs()}"
            )
            assert job["JobState"] not in OVER, f"job {number} is over: {job}\n{self.outputs()}"
            time.sleep(1)

    def outputs(self) -> str:
        """Collect the output of all jobs, for a test that fails."""
        return "\n".join(
            f"== {path}\n{path.read_text()}" for path in sorted(self.folder.glob("**/job-*.out"))
        )


@pytest.fixture(scope="session")
def slurm(python: Callable[..., Done]) -> Iterator[Slurm]:
    """Start two nodes, n1 and n2, of three cores each; skip without Slurm or namespaces."""
    # Not with mkdtemp's mode, and not below TMPDIR, of which each node has its own.
    folder = Path(tempfile.mkdtemp(prefix="mpillm-slurm-"))
    up = subprocess.Popen(
        [
            sys.executable,
            MINICLUSTER,
            "up",
            "--state",
            folder / "cluster",
            "--cpus",
            str(CPUS),
            "--hold",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert up.stdin
    assert up.stdout
    assert up.stderr
    try:
        if up.stdout.readline() != "up\n":
            said = up.stderr.read().strip()
            if up.wait() == UNAVAILABLE:
                pytest.skip(said)
            raise AssertionError(said)
        yield Slurm(folder, python)
    finally:
        # The end of its input takes the cluster down.
        up.stdin.close()
        up.wait()
        up.stdout.close()
        up.stderr.close()
        shutil.rmtree(folder, ignore_errors=True)
