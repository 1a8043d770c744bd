"""Measure what the compiled kernel gains over NumPy and torch: the all-reduce within a node.

    mpirun -n 2 python benchmarks/kernel.py [--rounds 31 --sizes 1024,65536,1048576,33554432]

All work on the same rows of shared memory: each rank sums its block over all rows and writes it
into every row. NumPy and torch call the kernel's barrier before and after, since Python has no
atomic flags. They take turns within each round; ratios are taken within a round. `no flags` leaves
the barriers out: the arithmetic alone.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from mpi4py import MPI

from mpillm.bench.timing import in_turn
from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.buffers import from_octets
from mpillm.comm.communicator import Communicator
from mpillm.comm.shared.team import SharedRows

PIECE_BYTES = 128 * 1024
Call = Callable[[], object]


def by_library(rows: SharedRows, group: Communicator, barrier: Call) -> Call:
    """Reduce by NumPy (float32) or torch: NumPy adds float16 slowly and lacks bfloat16."""
    flats = [from_octets(octets, rows.element).flat for octets in rows.octets]
    if rows.element == "float16":
        flats = [torch.from_numpy(flat) for flat in flats]
    bounds = block_bounds(rows.count, group.size)
    first, stop = bounds[group.rank], bounds[group.rank + 1]
    step = PIECE_BYTES // flats[0].itemsize

    def call() -> None:
        barrier()
        for start in range(first, stop, step):
            piece = slice(start, min(start + step, stop))
            total = flats[0][piece]
            for flat in flats[1:]:
                total += flat[piece]
            for flat in flats[1:]:
                flat[piece] = total
        barrier()

    return call


def measure(
    group: Communicator, calls: dict[str, Call], rounds: int, nbytes: int
) -> dict[str, np.ndarray]:
    """Measure the seconds of each call in each round, on the slowest rank."""
    batch = max(1, min(100, 2**20 // nbytes))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in in_turn(list(calls), turn):
            call = calls[name]
            group.barrier()
            began = time.perf_counter()
            for _ in range(batch):
                call()
            if turn:
                taken[name].append((time.perf_counter() - began) / batch)
    return {name: np.max(group.comm.allgather(seconds), axis=0) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--sizes", default="1024,65536,1048576,33554432")
    options = parser.parse_args()
    torch.set_num_threads(1)
    group = Communicator(MPI.COMM_WORLD)
    for element in ("float32", "float16", "bfloat16"):
        for nbytes in map(int, options.sizes.split(",")):
            rows = group.allocate(nbytes // (4 if element == "float32" else 2), element)
            assert rows is not None, "the ranks must share memory"
            barrier = group.prepare("barrier").bare
            calls = {
                "kernel": group.prepare("allreduce", rows.buffer).bare,
                "library": by_library(rows, group, barrier),
                "library, no flags": by_library(rows, group, lambda: None),
            }
            seconds = measure(group, calls, options.rounds, nbytes)
            if group.rank == 0:
                columns = []
                for name, own in seconds.items():
                    low, middle, high = np.percentile(own / seconds["kernel"], [25, 50, 75])
                    columns.append(
                        f"{name} {np.median(own) * 1e6:,.1f} µs "
                        f"({middle:.2f} [{low:.2f}..{high:.2f}])"
                    )
                print(f"{element:9s} {nbytes:11,d} bytes  {'  '.join(columns)}", flush=True)
            calls.clear()
            rows.free()
    group.free()


if __name__ == "__main__":
    main()
