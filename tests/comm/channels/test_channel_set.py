"""Mail: arrays handed over along edges, both ways of going, and what it refuses."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpillm.comm.channels.channel import wished_ways
from mpillm.comm.channels.channel_set import Channel, ChannelSet
from mpillm.comm.channels.setup import SLOTS, lay_out
from mpillm.comm.mesh import on_one_node
from mpillm.errors import CommError

WAYS = ("shared", "messages")
# Above what MPI libraries send without asking the receiver.
LONG = 300_000


@pytest.fixture(params=["auto", *WAYS])
def way(request, comm):
    if request.param == "shared" and not on_one_node(comm):
        pytest.skip("the ranks share no memory")
    return request.param


def ring(size, nbytes=LONG):
    """Channel 2r leads from rank r to the right, edge 2r + 1 from the right back to r; none where a rank is alone."""
    return [
        edge
        for rank in range(size if size > 1 else 0)
        for edge in (
            Channel(rank, (rank + 1) % size, nbytes),
            Channel((rank + 1) % size, rank, nbytes),
        )
    ]


def own(mail, role):
    return [number for number, edge in enumerate(mail.edges) if getattr(edge, role) == mail.rank]


def message(edge, turn, longest=LONG):
    chance = np.random.default_rng((edge, turn))
    return chance.integers(0, 256, chance.integers(0, longest + 1), dtype=np.uint8)


def check_arrived(arrived):
    for (edge, turn), array in arrived.items():
        np.testing.assert_array_equal(
            array, message(edge, turn), err_msg=f"edge {edge}, message {turn}"
        )


def test_a_ring_both_ways_keeps_order_and_contents(comm, way):
    mail = ChannelSet(comm, ring(comm.size), way=way)
    if way == "auto":
        assert on_one_node(comm) or "messages" in mail.ways
    else:
        assert mail.ways == [way] * len(mail.edges)
    arrived = {}
    for turn in range(20):
        for edge in own(mail, "receiver"):
            arrived[edge, turn] = np.zeros_like(message(edge, turn))
            mail.expect(edge, arrived[edge, turn])
        for edge in own(mail, "sender"):
            mail.send(edge, message(edge, turn))
        for edge in own(mail, "receiver"):
            mail.wait(edge)
    mail.free()
    check_arrived(arrived)


@pytest.mark.parametrize("late", [True, False])
def test_more_messages_than_slots_before_anyone_receives(comm, way, late):
    """All ranks send first, so every outbox is in use; receives are posted late, or ahead."""
    mail, count = ChannelSet(comm, ring(comm.size), way=way), 3 * SLOTS + 1
    arrived = {
        (e, turn): np.zeros_like(message(e, turn))
        for e in own(mail, "receiver")
        for turn in range(count)
    }
    if not late:
        for (edge, _), array in arrived.items():
            mail.expect(edge, array)
    for edge in own(mail, "sender"):
        for turn in range(count):
            mail.send(edge, message(edge, turn))
    if late:
        for (edge, _), array in arrived.items():
            mail.expect(edge, array)
    for edge, _ in arrived:
        mail.wait(edge)
    mail.drain()
    mail.free()
    check_arrived(arrived)


def test_draining_takes_what_others_send(comm, way):
    """Every rank drains before it waits: this ends only if arrivals are taken meanwhile."""
    mail, count = ChannelSet(comm, ring(comm.size), way=way), 2 * SLOTS + 2
    arrived = {
        (e, turn): np.zeros_like(message(e, turn))
        for e in own(mail, "receiver")
        for turn in range(count)
    }
    for (edge, _), array in arrived.items():
        mail.expect(edge, array)
    array = np.empty(LONG, np.uint8)
    for turn in range(count):
        for edge in own(mail, "sender"):
            given = array[: message(edge, turn).size]
            given[:] = message(edge, turn)
            mail.send(edge, given)
            mail.drain()
            array[:] = 0
    for edge, _ in arrived:
        mail.wait(edge)
    check_arrived(arrived)
    mail.free()


def test_waiting_for_one_edge_while_another_is_drained(comm, way):
    """Rank 0 fills edge 0, drains, and only then sends on edge 1, for which rank 1 waits first."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    mail, count = ChannelSet(comm, [Channel(0, 1, LONG), Channel(0, 1, LONG)], way=way), 3 * SLOTS
    if comm.rank == 0:
        for turn in range(count):
            mail.send(0, message(0, turn))
        mail.drain()
        mail.send(1, message(1, 0))
    if comm.rank == 1:
        arrived = {(0, turn): np.zeros_like(message(0, turn)) for turn in range(count)}
        arrived[1, 0] = np.zeros_like(message(1, 0))
        for (edge, _), array in arrived.items():
            mail.expect(edge, array)
        mail.wait(1)
        for _ in range(count):
            mail.wait(0)
        check_arrived(arrived)
    mail.free()


@pytest.mark.parametrize(
    "array",
    [
        torch.arange(999, dtype=torch.bfloat16).reshape(3, 333),
        torch.linspace(0, 1, 70_000).requires_grad_(),
        torch.tensor(3.5, dtype=torch.float16),
        np.arange(12.0).reshape(3, 4),
        np.empty((0, 7), np.int64),
        torch.empty(0, dtype=torch.bfloat16),
    ],
    ids=lambda array: f"{type(array).__name__} {array.dtype} {tuple(array.shape)}",
)
def test_kinds_of_arrays(comm, way, array):
    mail = ChannelSet(comm, ring(comm.size, 1 << 19), way=way)
    for edge in own(mail, "sender"):
        mail.send(edge, array)
    for edge in own(mail, "receiver"):
        got = (
            torch.zeros_like(array).detach()
            if isinstance(array, torch.Tensor)
            else np.zeros_like(array)
        )
        mail.expect(edge, got)
        mail.wait(edge)
        assert (got == array).all()
    mail.free()


def test_progress_fills_arrays_ahead_of_the_wait(comm, way):
    mail = ChannelSet(comm, ring(comm.size), way=way)
    arrays = {edge: np.zeros_like(message(edge, 0)) for edge in own(mail, "receiver")}
    for edge, array in arrays.items():
        mail.expect(edge, array)
    for edge in own(mail, "sender"):
        mail.send(edge, message(edge, 0))
    stop = time.monotonic() + 60
    while not all((array == message(edge, 0)).all() for edge, array in arrays.items()):
        assert time.monotonic() < stop, "progress alone fills the arrays"
        mail.progress()
    for edge in arrays:
        mail.wait(edge)
    mail.free()


@pytest.mark.parametrize("length", [0, 399, 401])
def test_another_length_is_told(comm, way, length):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    mail = ChannelSet(comm, [Channel(0, 1, 1000)], way=way)
    if comm.rank == 0:
        mail.send(0, np.ones(400, np.uint8))
        mail.drain()
    if comm.rank == 1:

        def receive():
            mail.expect(0, np.zeros(length, np.uint8))
            mail.wait(0)

        with pytest.raises(
            CommError, match=f"rank 0 sent a message of .* bytes, the array for it holds {length};"
        ):
            receive()
    # The thread may have failed of it, too.
    with suppress(CommError):
        mail.free()


def test_what_is_not_expected_cannot_be_waited_for(comm, way):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    mail = ChannelSet(comm, [Channel(0, 1, 1000)], way=way)
    if comm.rank == 0:
        with pytest.raises(
            CommError, match=r"an array of 1,001 bytes is too long for edge 0 \(rank 0 → rank 1"
        ):
            mail.send(0, np.zeros(1001, np.uint8))
        with pytest.raises(CommError, match="gaps"):
            mail.send(0, np.zeros((4, 4))[:, 1])
    else:
        with pytest.raises(CommError, match=f"rank {comm.rank} is not the sender of edge 0"):
            mail.send(0, np.zeros(1000, np.uint8))
    if comm.rank == 1:
        with pytest.raises(CommError, match="nothing is expected"):
            mail.wait(0)
        with pytest.raises(CommError, match="read-only"):
            mail.expect(0, np.broadcast_to(np.uint8(1), 1))
        with pytest.raises(CommError, match="edge 1 of 1"):
            mail.wait(1)
        # Forgotten by free.
        mail.expect(0, np.zeros(1000, np.uint8))
    else:
        with pytest.raises(CommError, match=f"rank {comm.rank} is not the receiver of edge 0"):
            mail.wait(0)
    mail.free()


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        ([Channel(0, 0, 10)], "leads from a rank to itself"),
        ([Channel(0, 99, 10)], "needs ranks from 0 to"),
        ([Channel(-1, 0, 10)], "needs ranks from 0 to"),
        ([Channel(0, 0, -1)], "bytes of 0 at least"),
    ],
)
def test_edges_that_cannot_be(comm, edges, words):
    with pytest.raises(CommError, match=words):
        ChannelSet(comm, edges)


def test_edges_differ(comm):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    last = comm.size - 1
    with pytest.raises(
        CommError,
        match=rf"edge 0 is \(rank 0 → rank 1, 10 bytes\) on rank 0 and \(.* 11 bytes\) on rank {last}",
    ):
        ChannelSet(comm, [Channel(0, 1, 10 + (comm.rank == last))])
    with pytest.raises(
        CommError,
        match=rf"edge 1 is \(none\) on rank 0 and \(rank 1 → rank 0, 5 bytes\) on rank {last}",
    ):
        ChannelSet(comm, [Channel(0, 1, 10), Channel(1, 0, 5)][: 1 + (comm.rank == last)])
    with pytest.raises(CommError, match=f"rank 0 has 'auto' and rank {last} 'messages'"):
        ChannelSet(comm, [Channel(0, 1, 10)], way="messages" if comm.rank == last else "auto")


def test_an_unknown_way(comm):
    with pytest.raises(CommError, match="did you mean 'shared'"):
        ChannelSet(comm, [], way="shred")


def test_ways_follow_nodes_and_the_profile():
    edges, node_of = [Channel(0, 1, 10), Channel(1, 2, 10), Channel(0, 1, 1000)], [0, 0, 2]
    profile = SimpleNamespace(faster_way=lambda nbytes: "messages" if nbytes < 100 else None)
    assert wished_ways(edges, node_of, "auto", None) == ["shared", "messages", "shared"]
    assert wished_ways(edges, node_of, "auto", profile) == ["messages", "messages", "shared"]
    assert wished_ways(edges, node_of, "messages", profile) == ["messages"] * 3
    assert wished_ways(edges[::2], node_of, "shared", profile) == ["shared"] * 2
    with pytest.raises(
        CommError, match=r"edge 1 \(rank 1 → rank 2, 10 bytes\) leads to another node"
    ):
        wished_ways(edges, node_of, "shared", None)


def test_mailboxes_do_not_overlap():
    places, row_bytes = lay_out({3: Channel(0, 1, 1000), 4: Channel(1, 0, 0), 7: Channel(0, 2, 1)})
    assert places[3][1] <= places[7][0]
    assert places[4][0] == 0
    assert row_bytes == places[7][1]
    assert all(first % 128 == 0 and stop - first >= 2 * SLOTS for first, stop in places.values())


def mapped():
    """How many of our shared memories this process has mapped."""
    return sum("/mpillm-" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_nothing_is_left(comm):
    before = mapped()
    for _ in range(50):
        mail = ChannelSet(comm, ring(comm.size, 1000))
        for edge in own(mail, "sender"):
            mail.send(edge, np.zeros(1000, np.uint8))
        for edge in own(mail, "receiver"):
            mail.expect(edge, np.ones(1000, np.uint8))
            mail.wait(edge)
        mail.free()
    del mail
    assert mapped() == before
    assert not list(Path("/dev/shm").glob(f"mpillm-{os.getpid()}-*"))


# Rank 0 sends and never calls MPI or Mail again until rank 1 has told it, by a file, that all has come.
SILENT_SENDER = """
import sys, time
from pathlib import Path
import numpy
from mpi4py import MPI
from mpillm.comm.channels.channel_set import Channel, Mail

comm, told = MPI.COMM_WORLD, Path(sys.argv[1])
mail = Mail(comm, [Channel(0, 1, 4 << 20)], way="shared")
arrays = [numpy.full(1 << 20, number, numpy.float32) for number in (1, 2)]
if comm.rank == 0:
    for array in arrays:
        mail.send(0, array)
    stop = time.monotonic() + 60
    while not told.exists() and time.monotonic() < stop:
        time.sleep(0.01)
    assert told.exists()
else:
    for array in arrays:
        got = numpy.zeros_like(array)
        mail.expect(0, got)
        mail.wait(0)
        assert (got == array).all()
    told.touch()
mail.free()
print("right", flush=True)
"""


@pytest.mark.alone
def test_the_sender_need_not_be_there(folder, python):
    script = folder / "silent.py"
    script.write_text(SILENT_SENDER)
    done = python(
        script, folder / "told", ranks=2, timeout=100, PYTHONPATH=os.pathsep.join(sys.path)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right") == 2


FALLS_BACK = """
import sys
import numpy
from mpillm.comm.channels.channel_set import Channel, Mail
from mpillm.comm.failure import fail_together
from mpillm.comm.world import open_world

comm = open_world()
with fail_together(comm):
    edges = [Channel(0, 1, 1 << 20), Channel(1, 0, 1 << 20)]
    mail = Mail(comm, edges, way=sys.argv[1], warn=lambda text: print("warning:", text, flush=True))
    array, got = numpy.full(1 << 20, comm.rank, numpy.uint8), numpy.zeros(1 << 20, numpy.uint8)
    mail.send(comm.rank, array)
    mail.expect(1 - comm.rank, got)
    mail.wait(1 - comm.rank)
    assert (got == 1 - comm.rank).all()
    mail.free()
    print("ways:", *mail.ways, flush=True)
"""


@pytest.fixture
def with_little_memory(folder, python):
    """Run FALLS_BACK on 2 ranks in a mount namespace whose /dev/shm is full."""
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("a mount namespace needs root, or a kernel that allows it to users")
    if "MPICH" in MPI.Get_library_version():
        pytest.skip("MPICH itself does not start where /dev/shm is full")

    def run(way: str):
        script = folder / "falls_back.py"
        script.write_text(FALLS_BACK)
        shell = f'mount -t tmpfs -o size=8m tmpfs /dev/shm && head -c {8 << 20} /dev/zero > /dev/shm/filled && exec "$@"'
        return python(
            script,
            way,
            ranks=2,
            before=["unshare", "--mount", "sh", "-c", shell, "sh"],
            timeout=100,
            # The MPI library's own use of /dev/shm is not what is tested.
            OMPI_MCA_btl_sm_backing_directory=str(folder),
            PYTHONPATH=os.pathsep.join(sys.path),
        )

    return run


@pytest.mark.alone
def test_a_full_shared_memory_falls_back_with_one_warning(with_little_memory):
    done = with_little_memory("auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ways: messages messages") == 2
    assert done.stdout.count("warning:") == 1
    assert "no room left; what is handed over within the node falls back to messages" in done.stdout


@pytest.mark.alone
def test_a_full_shared_memory_is_an_error_where_it_was_asked_for(with_little_memory):
    done = with_little_memory("shared")
    assert done.returncode != 0
    assert "no room left; make room there, or take way='auto'" in done.stderr


@pytest.mark.alone
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_sender_ends_the_job(folder, python, way):
    script = folder / "killed.py"
    script.write_text(
        "import os, signal, numpy\nfrom mpi4py import MPI\nfrom mpillm.comm.channels.channel_set import Channel, Mail\n"
        f"mail = Mail(MPI.COMM_WORLD, [Channel(1, 0, 100)], way={way!r})\n"
        "if mail.rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "mail.expect(0, numpy.zeros(100, numpy.uint8))\nmail.wait(0)\n"
    )
    started = time.monotonic()
    done = python(script, ranks=2, timeout=60, PYTHONPATH=os.pathsep.join(sys.path))
    assert done.returncode != 0
    assert time.monotonic() - started < 30
