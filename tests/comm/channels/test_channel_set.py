"""Channel sets: order and contents by both ways, fallback, dead peers, and refused arrays."""

import os
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpillm.comm.channels.channel import choose_ways
from mpillm.comm.channels.channel_set import Channel, ChannelSet
from mpillm.comm.channels.queue_setup import SLOTS, place_queues
from mpillm.errors import CommError
from mpillm.machine.node_map import map_nodes

WAYS = ("shared", "messages")
# Above the eager limit of MPI libraries.
LONG = 300_000


@pytest.fixture(params=["auto", *WAYS])
def way(request, comm):
    if request.param == "shared" and not map_nodes(comm).on_one_node:
        pytest.skip("the ranks share no memory")
    return request.param


def ring(size, nbytes=LONG):
    """Make channel 2r from rank r to its right, and 2r + 1 back; none for a single rank."""
    return [
        channel
        for rank in range(size if size > 1 else 0)
        for channel in (
            Channel(rank, (rank + 1) % size, nbytes),
            Channel((rank + 1) % size, rank, nbytes),
        )
    ]


def own(channel_set, role):
    return [
        number
        for number, channel in enumerate(channel_set.channels)
        if getattr(channel, role) == channel_set.rank
    ]


def message(channel, turn, longest=LONG):
    chance = np.random.default_rng((channel, turn))
    return chance.integers(0, 256, chance.integers(0, longest + 1), dtype=np.uint8)


def check_arrived(arrived):
    for (channel, turn), array in arrived.items():
        np.testing.assert_array_equal(
            array, message(channel, turn), err_msg=f"channel {channel}, message {turn}"
        )


def test_a_ring_both_ways_keeps_order_and_contents(comm, way):
    channel_set = ChannelSet(comm, ring(comm.size), way=way)
    if way == "auto":
        assert map_nodes(comm).on_one_node or "messages" in channel_set.ways
    else:
        assert channel_set.ways == [way] * len(channel_set.channels)
    arrived = {}
    for turn in range(20):
        for channel in own(channel_set, "receiver"):
            arrived[channel, turn] = np.zeros_like(message(channel, turn))
            channel_set.post_receive(channel, arrived[channel, turn])
        for channel in own(channel_set, "sender"):
            channel_set.send(channel, message(channel, turn))
        for channel in own(channel_set, "receiver"):
            channel_set.wait(channel)
    channel_set.free()
    check_arrived(arrived)


@pytest.mark.parametrize("late", [True, False])
def test_more_messages_than_slots_before_anyone_receives(comm, way, late):
    """All ranks send first, so every send queue fills; receives are posted late, or ahead."""
    channel_set, count = ChannelSet(comm, ring(comm.size), way=way), 3 * SLOTS + 1
    arrived = {
        (e, turn): np.zeros_like(message(e, turn))
        for e in own(channel_set, "receiver")
        for turn in range(count)
    }
    if not late:
        for (channel, _), array in arrived.items():
            channel_set.post_receive(channel, array)
    for channel in own(channel_set, "sender"):
        for turn in range(count):
            channel_set.send(channel, message(channel, turn))
    if late:
        for (channel, _), array in arrived.items():
            channel_set.post_receive(channel, array)
    for channel, _ in arrived:
        channel_set.wait(channel)
    channel_set.drain()
    channel_set.free()
    check_arrived(arrived)


def test_draining_takes_what_others_send(comm, way):
    """Every rank drains before it waits: this ends only if arrivals are taken meanwhile."""
    channel_set, count = ChannelSet(comm, ring(comm.size), way=way), 2 * SLOTS + 2
    arrived = {
        (e, turn): np.zeros_like(message(e, turn))
        for e in own(channel_set, "receiver")
        for turn in range(count)
    }
    for (channel, _), array in arrived.items():
        channel_set.post_receive(channel, array)
    array = np.empty(LONG, np.uint8)
    for turn in range(count):
        for channel in own(channel_set, "sender"):
            given = array[: message(channel, turn).size]
            given[:] = message(channel, turn)
            channel_set.send(channel, given)
            channel_set.drain()
            array[:] = 0
    for channel, _ in arrived:
        channel_set.wait(channel)
    check_arrived(arrived)
    channel_set.free()


def test_waiting_for_one_channel_while_another_is_drained(comm, way):
    """Rank 0 fills channel 0, drains, then sends on channel 1, for which rank 1 waits first."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    channel_set, count = (
        ChannelSet(comm, [Channel(0, 1, LONG), Channel(0, 1, LONG)], way=way),
        3 * SLOTS,
    )
    if comm.rank == 0:
        for turn in range(count):
            channel_set.send(0, message(0, turn))
        channel_set.drain()
        channel_set.send(1, message(1, 0))
    if comm.rank == 1:
        arrived = {(0, turn): np.zeros_like(message(0, turn)) for turn in range(count)}
        arrived[1, 0] = np.zeros_like(message(1, 0))
        for (channel, _), array in arrived.items():
            channel_set.post_receive(channel, array)
        channel_set.wait(1)
        for _ in range(count):
            channel_set.wait(0)
        check_arrived(arrived)
    channel_set.free()


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
    channel_set = ChannelSet(comm, ring(comm.size, 1 << 19), way=way)
    for channel in own(channel_set, "sender"):
        channel_set.send(channel, array)
    for channel in own(channel_set, "receiver"):
        got = (
            torch.zeros_like(array).detach()
            if isinstance(array, torch.Tensor)
            else np.zeros_like(array)
        )
        channel_set.post_receive(channel, got)
        channel_set.wait(channel)
        assert (got == array).all()
    channel_set.free()


def test_progress_fills_arrays_ahead_of_the_wait(comm, way):
    channel_set = ChannelSet(comm, ring(comm.size), way=way)
    arrays = {
        channel: np.zeros_like(message(channel, 0)) for channel in own(channel_set, "receiver")
    }
    for channel, array in arrays.items():
        channel_set.post_receive(channel, array)
    for channel in own(channel_set, "sender"):
        channel_set.send(channel, message(channel, 0))
    stop = time.monotonic() + 60
    while not all((array == message(channel, 0)).all() for channel, array in arrays.items()):
        assert time.monotonic() < stop, "progress alone fills the arrays"
        channel_set.progress()
    for channel in arrays:
        channel_set.wait(channel)
    channel_set.free()


@pytest.mark.parametrize("length", [0, 399, 401])
def test_another_length_is_refused(comm, way, length):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    channel_set = ChannelSet(comm, [Channel(0, 1, 1000)], way=way)
    if comm.rank == 0:
        channel_set.send(0, np.ones(400, np.uint8))
        channel_set.drain()
    if comm.rank == 1:

        def receive():
            channel_set.post_receive(0, np.zeros(length, np.uint8))
            channel_set.wait(0)

        with pytest.raises(
            CommError, match=f"rank 0 sent a message of .* bytes, the array for it holds {length};"
        ):
            receive()
    # The progress thread may have met the same error.
    with suppress(CommError):
        channel_set.free()


def test_what_is_not_expected_cannot_be_waited_for(comm, way):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    channel_set = ChannelSet(comm, [Channel(0, 1, 1000)], way=way)
    if comm.rank == 0:
        with pytest.raises(
            CommError, match=r"an array of 1,001 bytes is too long for channel 0 \(rank 0 → rank 1"
        ):
            channel_set.send(0, np.zeros(1001, np.uint8))
        with pytest.raises(CommError, match="gaps"):
            channel_set.send(0, np.zeros((4, 4))[:, 1])
    else:
        with pytest.raises(CommError, match=f"rank {comm.rank} is not the sender of channel 0"):
            channel_set.send(0, np.zeros(1000, np.uint8))
    if comm.rank == 1:
        with pytest.raises(CommError, match="no receive is posted"):
            channel_set.wait(0)
        with pytest.raises(CommError, match="read-only"):
            channel_set.post_receive(0, np.broadcast_to(np.uint8(1), 1))
        with pytest.raises(CommError, match="channel 1 of 1"):
            channel_set.wait(1)
        # Cancelled by free.
        channel_set.post_receive(0, np.zeros(1000, np.uint8))
    else:
        with pytest.raises(CommError, match=f"rank {comm.rank} is not the receiver of channel 0"):
            channel_set.wait(0)
    channel_set.free()


class Posted:
    """An endpoint with one posted array, without MPI."""

    def __init__(self):
        self.in_flight, self.filled = deque([None]), 0

    def progress(self):
        pass

    def post(self, octets):
        self.in_flight.append(octets)

    send = post


def test_wait_never_sees_an_array_between_flight_and_filled(comm):
    """The progress thread takes the array out of flight first, and counts it as filled after."""
    channel_set, receiver = ChannelSet(comm, []), Posted()
    channel_set._receivers[0] = receiver
    with ThreadPoolExecutor(1) as pool:
        with channel_set._lock:
            receiver.in_flight.popleft()
            waiting = pool.submit(channel_set.wait, 0)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.1)
            receiver.filled = 1
        waiting.result(timeout=10)
    assert receiver.filled == 0
    channel_set.free()


def test_after_the_threads_failure_nothing_starts(comm, monkeypatch):
    channel_set, end = ChannelSet(comm, []), Posted()
    channel_set.channels = (Channel(0, 1, 8),)
    channel_set._senders[0] = channel_set._receivers[0] = end

    class Failed:
        def check(self):
            raise CommError("the thread failed")

    with monkeypatch.context() as patch:
        patch.setattr(channel_set, "_thread", Failed())
        for start in (channel_set.send, channel_set.post_receive):
            with pytest.raises(CommError, match="the thread failed"):
                start(0, np.zeros(1))
    assert list(end.in_flight) == [None]
    channel_set._senders.clear()
    channel_set.free()


@pytest.mark.parametrize(
    ("channels", "words"),
    [
        ([Channel(0, 0, 10)], "leads from a rank to itself"),
        ([Channel(0, 99, 10)], "needs ranks from 0 to"),
        ([Channel(-1, 0, 10)], "needs ranks from 0 to"),
        ([Channel(0, 0, -1)], "a length of 0 bytes or more"),
    ],
)
def test_invalid_channels_are_refused(comm, channels, words):
    with pytest.raises(CommError, match=words):
        ChannelSet(comm, channels)


def test_channels_differ(comm):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    last = comm.size - 1
    with pytest.raises(
        CommError,
        match=r"channel 0 is \(rank 0 → rank 1, 10 bytes\) on rank 0 and "
        rf"\(.* 11 bytes\) on rank {last}",
    ):
        ChannelSet(comm, [Channel(0, 1, 10 + (comm.rank == last))])
    with pytest.raises(
        CommError,
        match=rf"channel 1 is \(none\) on rank 0 and \(rank 1 → rank 0, 5 bytes\) on rank {last}",
    ):
        ChannelSet(comm, [Channel(0, 1, 10), Channel(1, 0, 5)][: 1 + (comm.rank == last)])
    with pytest.raises(CommError, match=f"rank 0 has 'auto' and rank {last} 'messages'"):
        ChannelSet(comm, [Channel(0, 1, 10)], way="messages" if comm.rank == last else "auto")


def test_an_unknown_way(comm):
    with pytest.raises(CommError, match="did you mean 'shared'"):
        ChannelSet(comm, [], way="shred")


def test_ways_follow_nodes_and_the_profile():
    channels, node_of = [Channel(0, 1, 10), Channel(1, 2, 10), Channel(0, 1, 1000)], [0, 0, 2]
    profile = SimpleNamespace(faster_way=lambda nbytes: "messages" if nbytes < 100 else None)
    assert choose_ways(channels, node_of, "auto", None) == ["shared", "messages", "shared"]
    assert choose_ways(channels, node_of, "auto", profile) == ["messages", "messages", "shared"]
    assert choose_ways(channels, node_of, "messages", profile) == ["messages"] * 3
    assert choose_ways(channels[::2], node_of, "shared", profile) == ["shared"] * 2
    with pytest.raises(
        CommError, match=r"channel 1 \(rank 1 → rank 2, 10 bytes\) leads to another node"
    ):
        choose_ways(channels, node_of, "shared", None)


def test_queues_do_not_overlap():
    places, row_bytes = place_queues(
        {3: Channel(0, 1, 1000), 4: Channel(1, 0, 0), 7: Channel(0, 2, 1)}
    )
    assert places[3][1] <= places[7][0]
    assert places[4][0] == 0
    assert row_bytes == places[7][1]
    assert all(first % 128 == 0 and stop - first >= 2 * SLOTS for first, stop in places.values())


def mapped():
    """Count the shared segments of ours that this process has mapped."""
    return sum("/mpillm-" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_nothing_is_left(comm):
    before = mapped()
    for _ in range(50):
        channel_set = ChannelSet(comm, ring(comm.size, 1000))
        for channel in own(channel_set, "sender"):
            channel_set.send(channel, np.zeros(1000, np.uint8))
        for channel in own(channel_set, "receiver"):
            channel_set.post_receive(channel, np.ones(1000, np.uint8))
            channel_set.wait(channel)
        channel_set.free()
    del channel_set
    assert mapped() == before
    assert not list(Path("/dev/shm").glob(f"mpillm-{os.getpid()}-*"))


# Rank 0 sends, then calls neither MPI nor the channel set until rank 1 has all messages and makes
# the file `received`.
SILENT_SENDER = """
import sys, time
from pathlib import Path
import numpy
from mpi4py import MPI
from mpillm.comm.channels.channel_set import Channel, ChannelSet

comm, received = MPI.COMM_WORLD, Path(sys.argv[1])
channel_set = ChannelSet(comm, [Channel(0, 1, 4 << 20)], way="shared")
arrays = [numpy.full(1 << 20, number, numpy.float32) for number in (1, 2)]
if comm.rank == 0:
    for array in arrays:
        channel_set.send(0, array)
    stop = time.monotonic() + 60
    while not received.exists() and time.monotonic() < stop:
        time.sleep(0.01)
    assert received.exists()
else:
    for array in arrays:
        got = numpy.zeros_like(array)
        channel_set.post_receive(0, got)
        channel_set.wait(0)
        assert (got == array).all()
    received.touch()
channel_set.free()
print("right", flush=True)
"""


def test_the_sender_need_not_be_there(folder, python):
    script = folder / "silent.py"
    script.write_text(SILENT_SENDER)
    done = python(
        script, folder / "received", ranks=2, timeout=100, PYTHONPATH=os.pathsep.join(sys.path)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right") == 2


FALLS_BACK = """
import sys
import numpy
from mpillm.comm.channels.channel_set import Channel, ChannelSet
from mpillm.comm.failure import fail_together
from mpillm.comm.world import open_world

comm = open_world()
with fail_together(comm):
    channels = [Channel(0, 1, 1 << 20), Channel(1, 0, 1 << 20)]
    def warn(text):
        print("warning:", text, flush=True)

    channel_set = ChannelSet(comm, channels, way=sys.argv[1], warn=warn)
    array, got = numpy.full(1 << 20, comm.rank, numpy.uint8), numpy.zeros(1 << 20, numpy.uint8)
    channel_set.send(comm.rank, array)
    channel_set.post_receive(1 - comm.rank, got)
    channel_set.wait(1 - comm.rank)
    assert (got == 1 - comm.rank).all()
    channel_set.free()
    print("ways:", *channel_set.ways, flush=True)
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
        shell = (
            "mount -t tmpfs -o size=8m tmpfs /dev/shm && "
            f'head -c {8 << 20} /dev/zero > /dev/shm/filled && exec "$@"'
        )
        return python(
            script,
            way,
            ranks=2,
            before=["unshare", "--mount", "sh", "-c", shell, "sh"],
            timeout=100,
            # The MPI library itself needs room in /dev/shm; that is not under test.
            OMPI_MCA_btl_sm_backing_directory=str(folder),
            PYTHONPATH=os.pathsep.join(sys.path),
        )

    return run


def test_a_full_shared_memory_falls_back_with_one_warning(with_little_memory):
    done = with_little_memory("auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ways: messages messages") == 2
    assert done.stdout.count("warning:") == 1
    assert "are free; channels within the node fall back to messages" in done.stdout


def test_a_full_shared_memory_is_an_error_where_it_was_asked_for(with_little_memory):
    done = with_little_memory("shared")
    assert done.returncode != 0
    assert "are free; make room there, or take way='auto'" in done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_sender_ends_the_job(folder, python, way):
    script = folder / "killed.py"
    script.write_text(
        "import os, signal, numpy\nfrom mpi4py import MPI\n"
        "from mpillm.comm.channels.channel_set import Channel, ChannelSet\n"
        f"channel_set = ChannelSet(MPI.COMM_WORLD, [Channel(1, 0, 100)], way={way!r})\n"
        "if channel_set.rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "channel_set.post_receive(0, numpy.zeros(100, numpy.uint8))\nchannel_set.wait(0)\n"
    )
    started = time.monotonic()
    done = python(script, ranks=2, timeout=60, PYTHONPATH=os.pathsep.join(sys.path))
    assert done.returncode != 0
    assert time.monotonic() - started < 30
