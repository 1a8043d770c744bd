"""Time copies and sums by the offset of an array in its page: some processors copy slowly.

    mpirun -n 2 python benchmarks/alignment.py [--sum] [--mib 4 --rounds 60]

The source starts at a page, the target some bytes after one; both ranks send and receive at once.
With `--sum` the targets are all-reduced in node-shared memory instead. Offsets take turns within
each round. Printed: median seconds, and their ratio to those of the first offset.
"""

import argparse
import functools
import time

import numpy as np
from mpi4py import MPI

from mpillm.bench.timing import in_turn, slowest
from mpillm.comm.buffers import new_octets
from mpillm.comm.communicator import Communicator
from mpillm.comm.shared.segment import PAGE_BYTES

PLACES = (0, 4, 16, 28, 32, 64, 1024, PAGE_BYTES // 2, PAGE_BYTES // 2 + 16, PAGE_BYTES - 16)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sum", action="store_true", help="all-reduce by shared memory, instead of messages"
    )
    parser.add_argument("--mib", type=int, default=4, help="MiB of a message")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    nbytes, peer = options.mib * 2**20, comm.size - 1 - comm.rank
    source = new_octets(nbytes)
    targets = {str(place): new_octets(nbytes, place) for place in PLACES}
    for memory in (source, *targets.values()):
        memory.fill(0)
    calls = {
        name: functools.partial(comm.Sendrecv, source, peer, recvbuf=target, source=peer)
        for name, target in targets.items()
    }
    if options.sum:
        group = Communicator(comm)
        for name, target in targets.items():
            calls[name] = group.prepare(
                "allreduce", target.view(np.float32), algorithm="shared"
            ).run
    taken = np.zeros((len(PLACES), options.rounds))
    for turn in range(options.rounds):
        for name in in_turn(list(targets), turn):
            comm.Barrier()
            began = time.perf_counter()
            calls[name]()
            taken[list(targets).index(name), turn] = time.perf_counter() - began
    medians = np.median(slowest(comm, taken), axis=1)
    if comm.rank == 0:
        for place, seconds in zip(PLACES, medians, strict=True):
            print(
                f"{place:5d} bytes into its page: {seconds * 1e6:8,.0f} µs  "
                f"{seconds / medians[0]:.2f}"
            )


if __name__ == "__main__":
    main()
