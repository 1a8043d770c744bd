"""Send, receive, and sendrecv between ranks as one persistent request."""

from typing import TYPE_CHECKING

from mpillm.comm.buffers import Buffer, message_spans
from mpillm.comm.executors.request import Request

if TYPE_CHECKING:
    from mpi4py import MPI


def sendrecv_request(
    comm: "MPI.Intracomm",
    outgoing: Buffer | None,
    to: int | None,
    incoming: Buffer | None,
    source: int | None,
    tag: int,
) -> Request:
    """Set up persistent requests (MPI 4.1, section 3.9): one set-up for any number of messages."""
    requests: list[MPI.Prequest] = []
    # Receives start first, so that a message finds its receive posted and needs no extra copy.
    if incoming is not None and source is not None:
        requests += [
            comm.Recv_init(incoming.raw(*span), source, tag)
            for span in message_spans(incoming.count)
        ]
    if outgoing is not None and to is not None:
        requests += [
            comm.Send_init(outgoing.raw(*span), to, tag) for span in message_spans(outgoing.count)
        ]
    return SendrecvRequest(requests)


class SendrecvRequest:
    """Persistent requests that start together."""

    queued = False

    def __init__(self, requests: "list[MPI.Prequest]") -> None:
        self._requests = requests

    def run(self) -> None:
        self.start()
        self.wait()

    def start(self) -> None:
        for request in self._requests:
            request.Start()

    def test(self) -> bool:
        # No short circuit: each call of Test makes progress on its own message.
        return sum(not request.Test() for request in self._requests) == 0

    def wait(self) -> None:
        for request in self._requests:
            request.Wait()

    def __del__(self) -> None:
        from mpi4py import MPI

        # A persistent request lives until it is freed; after MPI_Finalize no call is allowed.
        if not MPI.Is_finalized():
            for request in self._requests:
                request.Free()
