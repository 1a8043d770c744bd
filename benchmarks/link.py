"""Measure which fraction of a link between two hosts an all-reduce fills, both ways at once.

    sh tests/fixtures/two_hosts.sh [--ranks-per-host 2] python benchmarks/link.py [--sizes 1M,4M]

First plain TCP sockets measure the link, one way and both ways at once. Then mpillm's algorithms,
the MPI library and torch's gloo take turns within each round, in random order. Traffic is read from
the counters of the network interface, of the sockets too, so headers count for all; the busier
direction counts. `--try 60K*8,1M*2` adds segmented algorithms with other segments and numbers in
flight. On a cluster, `--interface` names the link.
"""

import argparse
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mpillm.bench.bench_options import parse_sizes
from mpillm.bench.timing import in_turn
from mpillm.comm.communicator import Communicator
from mpillm.comm.executors import dispatch

OURS = ("mpi", "ring", "segmented-ring", "rabenseifner", "two-level")
SEGMENTED = ("segmented-ring", "two-level")
SOCKET_BYTES = 1 << 20
Call = Callable[[], object]


@dataclass
class Measured:
    """The measurements of one contestant, a value a round."""

    seconds: list[float] = field(default_factory=list)
    link_bytes: list[int] = field(default_factory=list)
    """Over the link, headers and all, in the busier direction."""

    def rates(self) -> list[float]:
        """Bytes a second."""
        return [sent / seconds for sent, seconds in zip(self.link_bytes, self.seconds, strict=True)]


def counter(interface: str) -> int:
    """Read how many bytes this host has sent over `interface`."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[8])
    raise SystemExit(
        f"this host has no network interface {interface}; name the link's by --interface"
    )


def timed(comm: MPI.Intracomm, call: Call, interface: str) -> tuple[float, int]:
    """Run `call` on all ranks; return the slowest rank's seconds and the busier host's bytes."""
    comm.Barrier()
    sent, started = counter(interface), time.perf_counter()
    call()
    seconds = time.perf_counter() - started
    comm.Barrier()
    sent = counter(interface) - sent
    return comm.allreduce(seconds, MPI.MAX), comm.allreduce(sent, MPI.MAX)


# ---- the link itself ----


def connect(comm: MPI.Intracomm, group: Communicator) -> socket.socket | None:
    """Connect the first ranks of the two hosts over TCP; return None on other ranks."""
    here, there = (ranks[0] for ranks in group.nodes)
    if comm.rank == here:
        with socket.create_server((socket.gethostbyname(socket.gethostname()), 0)) as server:
            comm.send(server.getsockname(), there)
            return server.accept()[0]
    return socket.create_connection(comm.recv(source=here)) if comm.rank == there else None


def push(wire: socket.socket, nbytes: int) -> None:
    block = bytes(SOCKET_BYTES)
    for _ in range(nbytes // SOCKET_BYTES):
        wire.sendall(block)


def pull(wire: socket.socket, nbytes: int) -> None:
    block = bytearray(SOCKET_BYTES)
    while nbytes:
        nbytes -= wire.recv_into(block, min(nbytes, SOCKET_BYTES))


def socket_calls(wire: socket.socket | None, sends: bool, nbytes: int) -> tuple[Call, Call]:
    """Make the calls that send one way, and both ways at once."""

    def one_way() -> None:
        if wire is not None:
            (push if sends else pull)(wire, nbytes)

    def both_ways() -> None:
        if wire is not None:
            sender = threading.Thread(target=push, args=(wire, nbytes))
            sender.start()
            pull(wire, nbytes)
            sender.join()

    return one_way, both_ways


def measure_link(
    comm: MPI.Intracomm, group: Communicator, options: argparse.Namespace
) -> dict[str, Measured]:
    wire = connect(comm, group)
    calls = socket_calls(wire, comm.rank == group.nodes[0][0], 32 * SOCKET_BYTES)
    found = interleave(comm, dict(zip(("one way", "both ways"), calls, strict=True)), options)
    if wire is not None:
        wire.close()
    return found


# ---- the contestants ----


def join_gloo(comm: MPI.Intracomm, interface: str) -> Callable[[Any], Call] | None:
    """Return what makes gloo's all-reduce of an array; None where torch is missing."""
    try:
        import torch
        import torch.distributed
    except ImportError:
        return None
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    path = comm.bcast(tempfile.mktemp(prefix="mpillm-gloo-") if comm.rank == 0 else None)
    store = torch.distributed.FileStore(path, comm.size)
    torch.distributed.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)

    def make(array: Any) -> Call:
        tensor = torch.from_numpy(array)
        return lambda: torch.distributed.all_reduce(tensor)

    return make


@contextmanager
def constants(segment_bytes: int, in_flight: int) -> Iterator[None]:
    """Replace the constants of the dispatcher for a while."""
    kept = dispatch.SEGMENT_BYTES, dispatch.IN_FLIGHT
    dispatch.SEGMENT_BYTES, dispatch.IN_FLIGHT = segment_bytes, in_flight
    try:
        yield
    finally:
        dispatch.SEGMENT_BYTES, dispatch.IN_FLIGHT = kept


def prepare(group: Communicator, array: Any, algorithm: str, text: str) -> Call:
    """Prepare a call. `text`: SEGMENT*IN_FLIGHT, or "" for the built-in numbers."""
    if not text:
        return group.prepare("allreduce", array, algorithm=algorithm).run
    size, _, number = text.partition("*")
    # A communicator takes the constants when it is made, and again when it prepares a call.
    with constants(parse_sizes(size)[0], int(number)):
        return Communicator(group.comm).prepare("allreduce", array, algorithm=algorithm).run


def contestants(
    group: Communicator, nbytes: int, gloo: Any, options: argparse.Namespace
) -> dict[str, Call]:
    """Make the calls, each on an array of its own: zeros, whose repeated sums stay zeros."""

    def zeros() -> Any:
        return np.zeros(nbytes // 4, np.float32)

    found: dict[str, Call] = {}
    for name in options.algorithms.split(","):
        if name in group.algorithms("allreduce"):
            tries = ["", *filter(None, options.tries.split(","))] if name in SEGMENTED else [""]
            found |= {
                f"{name} {text}".strip(): prepare(group, zeros(), name, text) for text in tries
            }
        elif name == "gloo" and gloo:
            found[name] = gloo(zeros())
    return found


def interleave(
    comm: MPI.Intracomm, calls: dict[str, Call], options: argparse.Namespace
) -> dict[str, Measured]:
    """Run each of `calls` once a round, in random order; a first round warms up."""
    found = {name: Measured() for name in calls}
    names = list(calls)
    for turn in range(options.rounds + 1):
        for name in in_turn(names, turn):
            seconds, sent = timed(comm, calls[name], options.interface)
            if turn:
                found[name].seconds.append(seconds)
                found[name].link_bytes.append(sent)
    return found


# ---- the output ----


def quartiles(values: list[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, [25, 50, 75])]


def spread(q: list[float], digits: int) -> str:
    return f"{q[1]:.{digits}f} [{q[0]:.{digits}f}..{q[2]:.{digits}f}]"


def summary(nbytes: int, found: dict[str, Measured], link_rate: float) -> list[dict[str, Any]]:
    """Make a row for each contestant; a ratio is the peer's time over its own in the same round."""

    def row(name: str, own: Measured) -> dict[str, Any]:
        ratios = {
            f"to_{peer}": quartiles(
                [b / a for a, b in zip(own.seconds, found[peer].seconds, strict=True)]
            )
            for peer in ("mpi", "gloo")
            if peer in found
        }
        return {
            "bytes": nbytes,
            "algorithm": name,
            "seconds": quartiles(own.seconds),
            "link_bytes": float(np.median(own.link_bytes)),
            "of_link": quartiles([rate / link_rate for rate in own.rates()]),
            **ratios,
        }

    return [row(name, own) for name, own in found.items()]


def print_link(link: dict[str, Measured]) -> float:
    """Print the link's rates; return that of each direction when both are busy."""
    for name, own in link.items():
        megabits = quartiles([8e-6 * rate for rate in own.rates()])
        print(
            f"the link by plain TCP sockets, {name}: {spread(megabits, 0)} Mbit/s each direction, "
            "headers included"
        )
    print(
        f"{'MiB':>6s}  {'algorithm':22s} {'ms':>26s}  {'MiB each way':>12s}  "
        f"{'of the link':22s} × mpi, × gloo"
    )
    return quartiles(link["both ways"].rates())[1]


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        ratios = "  ".join(spread(row[key], 2) for key in ("to_mpi", "to_gloo") if key in row)
        print(
            f"{row['bytes'] / 2**20:6g}  {row['algorithm']:22s} "
            f"{spread([1e3 * s for s in row['seconds']], 1):>26s}  "
            f"{row['link_bytes'] / 2**20:12.2f}  {spread(row['of_link'], 2):22s} {ratios}",
            flush=True,
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", default="1M,4M,16M,64M", help="bytes of float32, as mpillm bench reads them"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--algorithms", default=",".join([*OURS, "gloo"]))
    parser.add_argument(
        "--try",
        dest="tries",
        default="",
        help="other segments and numbers in flight: SEGMENT*NUMBER,…",
    )
    parser.add_argument("--interface", default="eth0")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser.parse_args()


def main() -> None:
    comm, options = MPI.COMM_WORLD, arguments()
    group = Communicator(comm, warn=print)
    if len(group.nodes) != 2:
        raise SystemExit(
            f"a link joins 2 hosts, these ranks are on {len(group.nodes)}; "
            "start them by tests/fixtures/two_hosts.sh"
        )
    gloo = join_gloo(comm, options.interface) if "gloo" in options.algorithms else None
    link = measure_link(comm, group, options)
    link_rate = 0.0
    if comm.rank == 0:
        print(f"{MPI.Get_library_version().splitlines()[0]}; ranks of each host: {group.nodes}")
        link_rate = print_link(link)
    rows = []
    for nbytes in parse_sizes(options.sizes):
        found = interleave(comm, contestants(group, nbytes, gloo, options), options)
        if comm.rank == 0:
            rows += summary(nbytes, found, link_rate)
            print_rows(rows[-len(found) :])
    if comm.rank == 0 and options.json:
        rates = {name: quartiles(own.rates()) for name, own in link.items()}
        options.json.write_text(
            json.dumps({"link_bytes_per_second": rates, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
