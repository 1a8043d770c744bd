"""Channel sets: pass arrays from rank to rank over channels known ahead, while both ranks compute.

    channel_set = ChannelSet(comm, [Channel(0, 1, nbytes), Channel(1, 0, nbytes)])
    channel_set.send(0, array)             # rank 0: starts the send, and continues to compute
    channel_set.post_receive(0, array)     # rank 1: posts the receive ahead
    ...
    channel_set.wait(0)                    # rank 1: returns when the array is filled

MPI transfers a large message while both ranks are inside MPI (the rendezvous protocol), so a
receiver would wait until the sender's computation ends. Within a node messages therefore pass
through SPSC queues in shared memory. The sender copies into a slot, the receiver copies out later,
and neither needs the other to be present. Between nodes they are MPI messages: receives are posted
ahead, and a thread makes progress.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpillm.comm.channels.channel import Channel, check_channels
from mpillm.comm.channels.endpoints import (
    Endpoint,
    MessageReceiver,
    MessageSender,
    Octets,
    Receiver,
    Sender,
    SharedReceiver,
    SharedSender,
    octets_of,
)
from mpillm.comm.channels.queue_setup import open_channels
from mpillm.comm.communicator import silent
from mpillm.comm.kernel import WAITING, SpscQueue
from mpillm.comm.progress_thread import ProgressThread
from mpillm.errors import CommError
from mpillm.machine.node_map import NodeMap, map_nodes

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.machine.cluster_profile import ClusterProfile, Way

__all__ = ["Channel", "ChannelSet"]


class ChannelSet:
    """Pass arrays over `channels`, each named by its number in the sequence.

    Every rank of `comm`, which is duplicated, makes it with the same channels. A channel is set up
    once: its endpoint, queue or tag. A message then takes the array's memory alone. A channel may
    carry arrays of any shape and type, up to its `nbytes`; they arrive in the order of `send`.

    `way`: "shared" or "messages" for all channels; "auto" takes shared memory within a node, unless
    `profile` has measured that messages are faster. Without room in shared memory, rank 0 calls
    `warn` and all channels use messages. `node_map`: of `comm`, else MPI is asked.

    Arrays are C-contiguous NumPy arrays or torch CPU tensors. Raises CommError, on every rank, for
    channels that differ between ranks, and where `way` asks for shared memory that has no room.
    """

    ways: "list[Way]"
    """Shared memory or messages, for each channel."""

    def __init__(
        self,
        comm: "MPI.Intracomm",
        channels: Sequence[Channel],
        *,
        way: str = "auto",
        profile: "ClusterProfile | None" = None,
        warn: Callable[[str], None] = silent,
        node_map: NodeMap | None = None,
    ) -> None:
        check_channels(comm, channels, way)
        self.channels, self.rank = tuple(channels), comm.rank
        self.ways, queues = open_channels(
            comm, node_map or map_nodes(comm), self.channels, way, profile, warn
        )
        # A communicator of its own: tags are channel numbers, and must meet no other messages.
        self._comm: MPI.Intracomm = comm.Dup()
        self._senders = {
            n: self._sender(n, queues)
            for n, channel in enumerate(channels)
            if channel.sender == self.rank
        }
        self._receivers = {
            n: self._receiver(n, queues)
            for n, channel in enumerate(channels)
            if channel.receiver == self.rank
        }
        endpoints: list[Endpoint] = [*self._senders.values(), *self._receivers.values()]
        self._messages = [
            endpoint
            for endpoint in endpoints
            if isinstance(endpoint, MessageReceiver | MessageSender)
        ]
        self._thread = ProgressThread(_MessageProgress(self._messages)) if self._messages else None
        # Calls of MPI from two threads must not overlap; without a thread nothing contends for it.
        self._lock = threading.Lock() if self._thread is None else self._thread.lock

    def _sender(self, number: int, queues: Mapping[int, SpscQueue]) -> Sender:
        if number in queues:
            return SharedSender(queues[number])
        return MessageSender(self._comm, self.channels[number].receiver, number)

    def _receiver(self, number: int, queues: Mapping[int, SpscQueue]) -> Receiver:
        if number in queues:
            return SharedReceiver(queues[number])
        return MessageReceiver(self._comm, self.channels[number].sender, number)

    def send(self, channel: int, array: Any) -> None:
        """Start to send `array` to the channel's receiver, and return.

        The array must not change until `drain` has returned. Raises CommError for an array longer
        than the channel's `nbytes`, and where this rank is not the sender.
        """
        sender = self._senders.get(channel)
        if sender is None:
            raise self._not_an_end("sender", channel, self._senders)
        octets = octets_of(array, writable=False)
        if octets.size > self.channels[channel].nbytes:
            raise self._too_long(channel, octets)
        with self._lock:
            if self._thread is not None:
                # Before the array is in flight: after an exception the caller may free it.
                self._thread.check()
            # In the order of calls: the receiver posts its arrays in the same order.
            sender.send(octets)
            self._progress_senders()
        if self._thread is not None and isinstance(sender, MessageSender):
            self._thread.resume()

    def post_receive(self, channel: int, array: Any) -> None:
        """Post a receive: `array` is filled by the channel's next message without one.

        The array is as long as the message. Raises CommError as `send` does.
        """
        receiver = self._receivers.get(channel)
        if receiver is None:
            raise self._not_an_end("receiver", channel, self._receivers)
        octets = octets_of(array, writable=True)
        if octets.size > self.channels[channel].nbytes:
            raise self._too_long(channel, octets)
        with self._lock:
            if self._thread is not None:
                self._thread.check()
            receiver.post(octets)
            self._progress_senders()
        if self._thread is not None and isinstance(receiver, MessageReceiver):
            self._thread.resume()

    def wait(self, channel: int) -> None:
        """Return when the channel's oldest posted array that was not waited for is filled.

        All other channels make progress meanwhile, so ranks may wait in any order. Raises CommError
        for a message of another length, and where the sender is on this node and has died.
        """
        receiver = self._receivers.get(channel)
        if receiver is None:
            raise self._not_an_end("receiver", channel, self._receivers)
        with self._lock:
            # The thread takes an array out of flight before it counts it as filled.
            posted = receiver.filled > 0 or bool(receiver.in_flight)
        if not posted:
            raise CommError(
                f"channel {channel} ({self.channels[channel]}): no receive is posted; call "
                "post_receive before wait"
            )
        if not self._poll(receiver):
            waiting = _Waiting()
            self._back_off(receiver, waiting)
            while not self._poll(receiver):
                self._back_off(receiver, waiting)
        self._settle()

    def progress(self) -> None:
        """Advance all that is in flight, without waiting."""
        with self._lock:
            self._progress_senders()
            for receiver in self._receivers.values():
                receiver.progress()

    def drain(self) -> None:
        """Return when every array that was sent may change: its message has left.

        The receivers need not have waited for their messages, but must have posted receives.
        """
        waiting = _Waiting()
        self.progress()
        while sending := [sender for sender in self._senders.values() if sender.in_flight]:
            waiting.back_off(sending)
            self.progress()
        self._settle()

    def free(self) -> None:
        """Send what is left, cancel posted receives, free memory. Every rank calls it, once."""
        try:
            self.drain()
        finally:
            if self._thread is not None:
                self._thread.end()
            # MPI must not write into arrays that the caller may free.
            for endpoint in self._messages:
                if isinstance(endpoint, MessageReceiver):
                    endpoint.cancel()
            self._senders, self._receivers = {}, {}
            self._comm.Free()

    # ---- inside ----

    def _not_an_end(self, role: str, channel: int, own: Mapping[int, Endpoint]) -> CommError:
        known = 0 <= channel < len(self.channels)
        name = (
            f"{channel} ({self.channels[channel]})"
            if known
            else f"{channel} of {len(self.channels)}"
        )
        return CommError(
            f"rank {self.rank} is not the {role} of channel {name}; its own are {list(own)}"
        )

    def _too_long(self, channel: int, octets: Octets) -> CommError:
        return CommError(
            f"an array of {octets.size:,} bytes is too long for channel {channel} "
            f"({self.channels[channel]}); make the channel with more bytes"
        )

    def _progress_senders(self) -> None:
        """Advance the send queues; with the lock held. Raises what the thread failed of."""
        if self._thread is not None:
            self._thread.check()
        for sender in self._senders.values():
            if sender.in_flight:
                sender.progress()

    def _poll(self, receiver: Receiver) -> bool:
        """Advance all channels; True when `receiver` had a filled array, then waited for."""
        with self._lock:
            self._progress_senders()
            # This channel first: the others' copies would delay it.
            receiver.progress()
            if receiver.filled:
                receiver.filled -= 1
                return True
            for other in self._receivers.values():
                if other is not receiver:
                    other.progress()
        return False

    def _back_off(self, receiver: Receiver, waiting: "_Waiting") -> None:
        """Wait between two polls. With empty send queues, block in the receiver's queue alone."""
        queued = any(
            isinstance(sender, SharedSender) and sender.in_flight
            for sender in self._senders.values()
        )
        if isinstance(receiver, SharedReceiver) and not queued:
            # In slices, so that the other channels make progress in between.
            receiver.block(WAITING["SLICE_SECONDS"])
            waiting.suspect([receiver])
        else:
            waiting.back_off([receiver])

    def _settle(self) -> None:
        """Let the thread sleep where no MPI message is in flight."""
        if self._thread is not None and not any(end.in_flight for end in self._messages):
            self._thread.pause()


class _MessageProgress:
    """The endpoints that the progress thread advances."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self._endpoints = endpoints

    def progress(self) -> None:
        for endpoint in self._endpoints:
            endpoint.progress()


class _Waiting:
    """A wait's polls so far: back off between them, the longer the more."""

    def __init__(self) -> None:
        self._began, self._polls = time.monotonic(), 0

    def back_off(self, endpoints: Sequence[Endpoint]) -> None:
        """Offer the core to others between two polls; sleep at times in a long wait."""
        self.suspect(endpoints)
        self._polls += 1
        patient = time.monotonic() - self._began > WAITING["PATIENCE_SECONDS"]
        if self._polls % WAITING["POLLS_A_SLEEP"] == 0 and patient:
            time.sleep(WAITING["SLEEP_SECONDS"])
        else:
            os.sched_yield()

    def suspect(self, endpoints: Sequence[Endpoint]) -> None:
        """Check, in a long wait, that the peers of `endpoints` live."""
        if time.monotonic() - self._began > WAITING["SUSPICION_SECONDS"]:
            for endpoint in endpoints:
                endpoint.check()
