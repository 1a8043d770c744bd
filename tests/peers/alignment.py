"""How much slower a message is where its target stands a little further in its page than its source.

    mpirun -n 2 python tests/peers/alignment.py [--mib 4 --rounds 60]

The source begins with a page, the target so many bytes behind one; both ranks send and receive at once. Places take
turns within each round, in changing order; told are the median seconds and their ratio to those of the first place.
"""

import argparse
import time

import numpy as np
from mpi4py import MPI

from mpillm.bench.timing import in_turn, slowest
from mpillm.comm.buffers import new_octets
from mpillm.comm.memory import PAGE_BYTES

PLACES = (0, 4, 16, 28, 32, 64, 1024, PAGE_BYTES // 2, PAGE_BYTES - 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=4, help="MiB of a message")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    nbytes, peer = options.mib * 2**20, comm.size - 1 - comm.rank
    source = new_octets(nbytes)
    targets = {str(place): new_octets(nbytes, place) for place in PLACES}
    for memory in (source, *targets.values()):
        memory.fill(1)
    taken = np.zeros((len(PLACES), options.rounds))
    for turn in range(options.rounds):
        for name in in_turn(list(targets), turn):
            comm.Barrier()
            began = time.perf_counter()
            comm.Sendrecv(source, peer, recvbuf=targets[name], source=peer)
            taken[list(targets).index(name), turn] = time.perf_counter() - began
    medians = np.median(slowest(comm, taken), axis=1)
    if comm.rank == 0:
        for place, seconds in zip(PLACES, medians, strict=True):
            print(f"{place:5d} bytes into its page: {seconds * 1e6:8,.0f} µs  {seconds / medians[0]:.2f}")


if __name__ == "__main__":
    main()
