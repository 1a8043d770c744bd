"""The compiled SPSC queue alone, without MPI: slots, lengths, order, and a dead peer."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mpillm.comm import kernel
from mpillm.errors import CommError

# Several of the pieces in which a message is copied.
LONG = 1_000_000


def both_ends(slots=2, slot_bytes=LONG, process=0):
    memory = np.zeros(kernel.spsc_queue_bytes(slots, slot_bytes), np.uint8)
    return tuple(
        kernel.SpscQueue(memory, slots, slot_bytes, sends, int(sends), process, 50, CommError)
        for sends in (True, False)
    )


def octets(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_slots_fill_and_empty_in_order(slots):
    sender, receiver = both_ends(slots, 100)
    array = np.zeros(100, np.uint8)
    for turn in range(5):
        for number in range(slots):
            assert sender.try_send(np.full(100, turn + number, np.uint8))
        assert not sender.try_send(array)
        for number in range(slots):
            assert receiver.try_receive(array)
            assert (array == turn + number).all()
        assert not receiver.try_receive(array)


def test_messages_of_any_length_that_fits():
    sender, receiver = both_ends()
    for turn, count in enumerate(
        (0, 1, 127, 128, 129, 64 * 1024, 64 * 1024 + 1, 3 * 64 * 1024, LONG, 0, 5)
    ):
        array, got = octets(count, turn), np.zeros(count, np.uint8)
        assert sender.send(array)
        assert receiver.receive(got)
        np.testing.assert_array_equal(got, array)


def test_other_types_and_read_only_arrays_are_bytes():
    sender, receiver = both_ends()
    array, got = np.arange(100.0), np.zeros(100)
    array.flags.writeable = False
    assert sender.try_send(array)
    assert receiver.try_receive(got)
    np.testing.assert_array_equal(got, array)
    assert sender.try_send(array)
    with pytest.raises(TypeError, match="read-write"):
        receiver.try_receive(array)


@pytest.mark.parametrize("length", [0, 399, 401, LONG])
@pytest.mark.parametrize("method", ["try_receive", "receive"])
def test_another_length_is_refused_and_nothing_lost(length, method):
    sender, receiver = both_ends()
    array, got = octets(400), np.zeros(400, np.uint8)
    assert sender.try_send(array)
    with pytest.raises(
        CommError, match=f"rank 0 sent a message of 400 bytes, the array for it holds {length};"
    ):
        getattr(receiver, method)(np.zeros(length, np.uint8))
    assert receiver.receive(got)
    np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("method", ["try_send", "send"])
def test_a_message_that_is_too_long(method):
    sender, receiver = both_ends(slot_bytes=100)
    with pytest.raises(CommError, match="message of 101 bytes to rank 1 is longer than the 100"):
        getattr(sender, method)(np.zeros(101, np.uint8))
    assert not receiver.try_receive(np.zeros(101, np.uint8))


def test_waiting_has_an_end():
    sender, receiver = both_ends(1, 8)
    array, started = np.zeros(8, np.uint8), time.monotonic()
    assert not receiver.receive(array, 0.0)
    assert not receiver.receive(array, 0.12)
    assert time.monotonic() - started >= 0.12
    assert sender.send(array, 0.0)
    assert not sender.send(array, 0.0)
    assert receiver.receive(array, 0.0)


def test_an_end_does_what_it_was_made_for():
    sender, receiver = both_ends()
    array = np.zeros(8, np.uint8)
    for method in (sender.receive, sender.try_receive, receiver.send, receiver.try_send):
        with pytest.raises(RuntimeError, match="sends or receives"):
            method(array)


def test_memory_must_fit():
    memory = np.zeros(kernel.spsc_queue_bytes(2, 100), np.uint8)
    for memory_given, slots in ((memory, 3), (memory, 0), (memory[1:], 1)):
        with pytest.raises(ValueError, match="must fit"):
            kernel.SpscQueue(memory_given, slots, 100, True, 1, 0, 50, CommError)


def gone():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return process.pid


@pytest.mark.usefixtures("processes")
def test_a_peer_that_is_gone_is_named():
    process = gone()
    sender, receiver = both_ends(1, 1000, process)
    array, started = np.zeros(1000, np.uint8), time.monotonic()
    with pytest.raises(
        CommError,
        match=rf"rank 0 \(process {process}\) has died while this rank waited for its message",
    ):
        receiver.receive(array)
    # A free slot still takes a message, and a whole message still arrives; else it raises.
    assert sender.send(octets(1000))
    receiver.check()
    with pytest.raises(
        CommError, match=rf"rank 1 \(process {process}\) has died while this rank waited to send"
    ):
        sender.send(array)
    assert receiver.receive(array)
    np.testing.assert_array_equal(array, octets(1000))
    with pytest.raises(CommError, match="has died"):
        receiver.check()
    assert time.monotonic() - started < 20


RECEIVER = """
import numpy
from mpillm.comm import kernel
memory = numpy.zeros(kernel.spsc_queue_bytes(1, 8), numpy.uint8)
queue = kernel.SpscQueue(memory, 1, 8, False, 0, 0, 50, ValueError)
print('waiting', flush=True)
queue.receive(numpy.zeros(8, numpy.uint8))
"""


@pytest.mark.usefixtures("processes")
def test_a_signal_is_handled_while_waiting(interrupted):
    assert "KeyboardInterrupt" in interrupted(RECEIVER)


ONE_WAY = """
import mmap, sys, time
import numpy as np
from mpillm.comm import kernel
path, slots, sends = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
with open(path, "r+b") as file:
    memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
queue = kernel.SpscQueue(memory, slots, 400_000, sends, 0, 0, 50, ValueError)
chance = np.random.default_rng(1)
for turn in range(400):
    array = chance.integers(0, 256, chance.integers(0, 400_000), dtype=np.uint8)
    if turn % 50 == 10 * sends:
        time.sleep(0.005)
    if sends:
        queue.send(array)
    else:
        got = np.zeros_like(array)
        queue.receive(got)
        assert (got == array).all(), turn
print("right")
"""


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_two_processes_keep_order_and_contents(folder, slots):
    """Each end sleeps at times, so the slots are full at times and empty at others."""
    path = folder / "memory"
    path.write_bytes(bytes(kernel.spsc_queue_bytes(slots, 400_000)))
    ends = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_WAY, path, str(slots), sends],
            stdout=subprocess.PIPE,
            text=True,
        )
        for sends in ("True", "False")
    ]
    assert [end.communicate(timeout=60)[0] for end in ends] == ["right\n"] * 2


@pytest.mark.usefixtures("processes")
def test_a_killed_sender_leaves_its_whole_messages(folder):
    """It dies while the receiver waits for a second message; the first had arrived."""
    path = folder / "memory"
    path.write_bytes(bytes(kernel.spsc_queue_bytes(2, 1000)))
    script = ONE_WAY.replace("range(400)", "range(1)").replace(
        'print("right")', "print('sent', flush=True); time.sleep(99)"
    )
    sender = subprocess.Popen(
        [sys.executable, "-c", script.replace("400_000", "1000"), path, "2", "True"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert sender.stdout is not None
    assert sender.stdout.readline() == "sent\n"
    memory = np.memmap(path, np.uint8, "r+")
    receiver = kernel.SpscQueue(memory, 2, 1000, False, 1, sender.pid, 50, CommError)
    chance = np.random.default_rng(1)
    array = chance.integers(0, 256, chance.integers(0, 1000), dtype=np.uint8)
    got = np.zeros_like(array)
    os.kill(sender.pid, signal.SIGKILL)
    sender.wait()
    assert receiver.receive(got)
    np.testing.assert_array_equal(got, array)
    with pytest.raises(CommError, match=rf"rank 1 \(process {sender.pid}\) has died"):
        receiver.receive(got)
