"""Point to point: sends, receives, and both at once, as stages."""

from typing import TYPE_CHECKING

from mpillm.comm.buffers import Buffer
from mpillm.comm.executors.mpi_library import pieces
from mpillm.comm.executors.request import Request

if TYPE_CHECKING:
    from mpi4py import MPI


def exchange_stage(
    comm: "MPI.Intracomm",
    given: Buffer | None,
    to: int | None,
    taken: Buffer | None,
    source: int | None,
    tag: int,
) -> Request:
    """Persistent requests (MPI 4.1, section 3.9): what can be set up once is not set up for each message."""
    requests: list[MPI.Prequest] = []
    if taken is not None and source is not None:
        requests += [comm.Recv_init(taken.raw(*span), source, tag) for span in _spans(taken)]
    if given is not None and to is not None:
        requests += [comm.Send_init(given.raw(*span), to, tag) for span in _spans(given)]
    return SendrecvRequest(requests)


def _spans(buffer: Buffer) -> list[tuple[int, int]]:
    # An empty array is a message too: the receiver waits for it.
    return pieces(buffer.count) or [(0, 0)]


class SendrecvRequest:
    """Messages that are started together."""

    def __init__(self, requests: "list[MPI.Prequest]") -> None:
        self._requests = requests

    def run(self) -> None:
        self.start()
        self.wait()

    def start(self) -> None:
        for request in self._requests:
            request.Start()

    def test(self) -> bool:
        # Each is asked, so that each moves.
        return sum(not request.Test() for request in self._requests) == 0

    def wait(self) -> None:
        for request in self._requests:
            request.Wait()

    def __del__(self) -> None:
        from mpi4py import MPI

        if not MPI.Is_finalized():
            for request in self._requests:
                request.Free()
