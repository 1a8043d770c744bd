"""The node's team and its memory, without room, and with a rank that has ended."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.comm import kernel
from mpillm.comm.communicator import Communicator
from mpillm.comm.shared.segment import SharedSegment, share_segment
from mpillm.comm.shared.team import KINDS
from mpillm.errors import CommError
from mpillm.machine.node_map import map_nodes

SUMS = """
import sys
import numpy
from mpillm.comm.communicator import Communicator
from mpillm.comm.failure import fail_together
from mpillm.comm.world import open_world

comm = open_world()
with fail_together(comm):
    communicator = Communicator(comm, warn=lambda text: print("warning:", text, flush=True))
    count = int(sys.argv[1])
    rows = communicator.allocate(count, "float32")
    array = numpy.ones(count, numpy.float32) if rows is None else rows.own
    array[:] = 1
    communicator.allreduce(array)
    assert (array == comm.size).all()
    if comm.rank == 0:
        names = communicator.algorithms("allreduce")
        print("algorithms:", *names, "; rows:", rows is not None, flush=True)
"""


def test_rows_are_zero_and_seen_by_all(comm):
    if not map_nodes(comm).on_one_node:
        pytest.skip("the ranks share no memory")
    for nbytes in (0, 1, 5000, 3 << 20):
        memory = share_segment(comm, nbytes)
        assert isinstance(memory, SharedSegment)
        assert [row.size for row in memory.rows] == [nbytes] * comm.size
        assert not any(row.any() for row in memory.rows)
        comm.Barrier()
        memory.own[:] = comm.rank + 1
        comm.Barrier()
        assert all((row == rank + 1).all() for rank, row in enumerate(memory.rows))
        comm.Barrier()


@pytest.mark.parametrize(
    ("nbytes", "folder"), [(1 << 44, "/dev/shm"), (100, "/dev/shm/nowhere/at/all")]
)
def test_a_failed_allocation_is_reported_on_every_rank(comm, nbytes, folder):
    """16 TiB a rank is more than any node has."""
    if not map_nodes(comm).on_one_node:
        pytest.skip("the ranks share no memory")
    reasons = comm.allgather(share_segment(comm, nbytes, Path(folder)))
    assert len(set(reasons)) == 1
    assert "rank 0: " in reasons[0]
    assert "are free" in reasons[0] or "No such file" in reasons[0]


def test_nothing_is_left_in_the_folder(comm):
    if not map_nodes(comm).on_one_node:
        pytest.skip("the ranks share no memory")
    memory = share_segment(comm, 1000)
    comm.Barrier()
    assert isinstance(memory, SharedSegment)
    assert not list(Path("/dev/shm").glob(f"mpillm-{os.getpid()}-*"))


def polled(operation):
    operation.start()
    given_up = time.monotonic() + 30
    while not operation.test():
        assert time.monotonic() < given_up


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("end", [kernel.Operation.run, polled])
def test_a_rank_that_is_gone_is_named(end):
    """Without a launcher one process ends; the other waits or polls, and must raise in seconds."""
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    memory = np.zeros(kernel.team_bytes(2, 4096), np.uint8)
    team = kernel.Team(memory, 0, 2, 4096, 100, (os.getpid(), gone.pid), CommError)
    array = np.ones(1000, np.float32)
    operation = team.operation(0, array, array, 1000, 0, 0, 1.0, 0, False, None, None)
    started = time.monotonic()
    with pytest.raises(
        CommError, match=f"rank 1 of this node \\(process {gone.pid}\\) ended while rank 0 waited"
    ):
        end(operation)
    assert time.monotonic() - started < 20


@pytest.mark.usefixtures("processes")
def test_a_rank_that_is_late_is_not_accused():
    memory = np.zeros(kernel.team_bytes(2, 4096), np.uint8)
    team = kernel.Team(memory, 0, 2, 4096, 100, (os.getpid(), os.getpid()), CommError)
    operation = team.operation(
        KINDS.index("barrier"), None, None, 0, 0, 0, 1.0, 0, False, None, None
    )
    operation.start()
    until = time.monotonic() + 1.5  # the first check is after 0.5 s
    while time.monotonic() < until:
        assert not operation.test()


@pytest.mark.usefixtures("processes")
def test_a_signal_is_handled_while_waiting(interrupted):
    """Ctrl-C must not wait for a peer that never comes."""
    script = (
        "import os, numpy\nfrom mpillm.comm import kernel\n"
        "memory = numpy.zeros(kernel.team_bytes(2, 4096), numpy.uint8)\n"
        "team = kernel.Team(memory, 0, 2, 4096, 100, (0, 0), ValueError)\n"
        "print('waiting', flush=True)\n"
        "team.operation(6, None, None, 0, 0, 0, 1.0, 0, False, None, None).run()\n"
    )
    assert "KeyboardInterrupt" in interrupted(script)


TEAM_OF_TWO = """
import mmap, sys, time
import numpy as np
from mpillm.comm import kernel
rank = int(sys.argv[2])
with open(sys.argv[1], "r+b") as file:
    memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
team = kernel.Team(memory, rank, 2, 4096, 50, (0, 0), ValueError)
for turn in range(300):
    count = 1 + turn * 37 % 5000
    array = np.full(count, rank + turn, np.int32)
    flat = count * 4 <= 4096 and turn % 2 == 1
    if turn % 50 == 0 and rank:
        time.sleep(0.01)
    team.operation(0, array, array, count, 6, 0, 1.0, 0, flat, None, None).run()
    assert (array == 2 * turn + 1).all(), turn
print("right")
"""


@pytest.mark.usefixtures("processes")
def test_two_processes_without_mpi(folder):
    """The flags alone keep order: one rank sleeps at times, through sums of many sizes."""
    path = folder / "memory"
    path.write_bytes(bytes(kernel.team_bytes(2, 4096)))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TEAM_OF_TWO, path, str(rank)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == ["right\n"] * 2


@pytest.fixture
def with_little_memory(folder, python):
    """Run SUMS on 2 ranks in a mount namespace whose /dev/shm has `free_bytes`."""
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("a mount namespace needs root, or a kernel that allows it to users")

    def run(free_bytes: int, count: int):
        if not free_bytes and "MPICH" in MPI.Get_library_version():
            pytest.skip("MPICH itself does not start where /dev/shm is full")
        script = folder / "sums.py"
        script.write_text(SUMS)
        shell = (
            f"mount -t tmpfs -o size={free_bytes + (8 << 20)} tmpfs /dev/shm && "
            f'head -c {8 << 20} /dev/zero > /dev/shm/filled && exec "$@"'
        )
        return python(
            script,
            str(count),
            ranks=2,
            before=["unshare", "--mount", "sh", "-c", shell, "sh"],
            timeout=100,
            # The MPI library itself needs room in /dev/shm; that is not under test.
            OMPI_MCA_btl_sm_backing_directory=str(folder),
            PYTHONPATH=os.pathsep.join(sys.path),
        )

    return run


@pytest.mark.parametrize(
    ("free_bytes", "count", "words"),
    [
        (0, 1000, "collectives within the node fall back to messages"),
        (4 << 20, 4 << 20, "arrays stay private to their ranks"),
    ],
)
def test_a_small_shared_memory_falls_back_with_one_warning(
    with_little_memory, free_bytes, count, words
):
    done = with_little_memory(free_bytes, count)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning:") == 1
    assert words in done.stdout
    assert "are free; " in done.stdout
    assert ("shared" in done.stdout.partition("algorithms:")[2]) == bool(free_bytes)
    assert "rows: False" in done.stdout


def test_more_ranks_than_a_team_takes_fall_back_with_one_warning(comm, monkeypatch):
    monkeypatch.setattr(kernel, "MOST_RANKS", 1)
    warnings = []
    communicator = Communicator(comm, warn=warnings.append)
    assert ("shared" in communicator.algorithms("allreduce")) == (comm.size == 1)
    array = np.ones(100)
    communicator.allreduce(array)
    assert (array == comm.size).all()
    if map_nodes(comm).on_one_node:
        rule = (
            f"{comm.size} ranks share a node, and at most 1 sum in its memory; "
            "collectives within the node fall back"
        )
        assert [text[: len(rule)] for text in warnings] == (
            [rule] if comm.rank == 0 < comm.size - 1 else []
        )
    communicator.free()


@pytest.mark.parametrize("algorithm", ["shared", "ring"])
def test_a_killed_rank_ends_the_job(folder, python, algorithm):
    script = folder / "killed.py"
    script.write_text(
        "import os, signal, sys, numpy\nfrom mpi4py import MPI\n"
        "from mpillm.comm.communicator import Communicator\n"
        "communicator = Communicator(MPI.COMM_WORLD)\narray = numpy.ones(100000, numpy.float32)\n"
        f"ready = communicator.prepare('allreduce', array, op='max', algorithm={algorithm!r})\n"
        "for turn in range(10**9):\n    if turn == 50 and communicator.rank == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    ready.run()\n"
    )
    started = time.monotonic()
    done = python(script, ranks=3, timeout=60, PYTHONPATH=os.pathsep.join(sys.path))
    assert done.returncode != 0
    assert time.monotonic() - started < 30
