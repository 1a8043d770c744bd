"""Measure how much of an all-reduce overlaps computation, polled and unpolled (osu_iallreduce)."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mpillm.bench import statistics
from mpillm.bench.collectives import keep_able
from mpillm.bench.competitors import (
    SHARED_PRIVATE,
    ArrayMemory,
    competitors,
    peers_wanted,
    runnable,
    select,
)
from mpillm.bench.context import BenchContext
from mpillm.bench.gemm import multiplier
from mpillm.bench.peers import Peer, joined
from mpillm.bench.results import Row, Section, Show, scaled, text, whole
from mpillm.bench.sample_arrays import Shape, fitting_count
from mpillm.bench.timing import Call, interleave, slowest

SLICES = 40
"""Slices of the computation, at most; the operation is polled between them."""
EDGE = 64
"""Edge of the multiplied matrices: they fit the core's cache, so only the core is busy."""
Start = Callable[[], Any]


def computation(seconds: float) -> tuple[Call, int]:
    """Calibrate the computation: give one unit of work and the units that take `seconds` here."""
    unit = multiplier("float32", EDGE, "cpu")
    trials = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(20):
            unit()
        trials.append((time.perf_counter() - started) / 20)
    return unit, max(1, round(seconds / min(trials)))


def work(unit: Call, units: int, between: Call = lambda: None) -> None:
    """Do `units` of work in up to SLICES equal slices; call `between` after each."""
    each = -(-units // SLICES)
    for _ in range(units // each):
        for _ in range(each):
            unit()
        between()


def run_overlap(bench: BenchContext) -> list[Section]:
    """Measure every algorithm of the all-reduce at every size.

    Every rank calls it, with the same options.
    """
    options, comm = bench.options, bench.comm
    names = select(
        options.algorithm_names, runnable(bench.group, "allreduce", options), bench.note, "overlap"
    )
    sizes, rows = options.sizes_of("overlap"), list[Row]()
    with (
        joined(comm, peers_wanted(options), bench.note, bench.group.node_map.on_one_node) as peers,
        bench.progress("overlap", len(sizes)) as advance,
    ):
        for size in sizes:
            count = fitting_count("allreduce", size, options.element, comm.size)
            rows += _measure(
                bench,
                Shape("allreduce", count, options.element, comm.size, comm.rank, True),
                names,
                peers,
            )
            advance()
    title = f"overlap of allreduce with matrix products, in at most {SLICES} slices"
    return [Section("overlap", title, rows, COLUMNS)]


COLUMNS: dict[str, Show] = {
    "bytes": whole("bytes"),
    "type": text("element"),
    "algorithm": text("algorithm"),
    "alone µs": scaled("alone_seconds", 1e6),
    "compute µs": scaled("compute_seconds", 1e6),
    "polled µs": scaled("polled_seconds", 1e6),
    "left alone µs": scaled("unpolled_seconds", 1e6),
    "overlap polled %": scaled("polled_overlap", 100),
    "left alone %": scaled("unpolled_overlap", 100),
}


def _measure(
    bench: BenchContext, shape: Shape, names: list[str], peers: Mapping[str, Peer]
) -> list[Row]:
    options = bench.options
    memory = ArrayMemory(bench.group, shape, options)
    entries = competitors(bench.group, peers, memory, names, options)
    entries.pop(SHARED_PRIVATE, None)
    keep_able(bench, entries)
    rows = []
    for name in entries:
        source, _ = memory.pair(name)
        source[...] = 0
        if name in peers:
            figures_of_one = _one(bench, peers[name].start(shape, source, None), _torch_poll)
        else:
            figures_of_one = _one(
                bench,
                bench.group.prepare("allreduce", source, algorithm=name).start,
                _poll,
            )
        rows.append(
            {"bytes": shape.nbytes, "element": shape.element, "algorithm": name} | figures_of_one
        )
        del source
    # As in collectives.py: no view may outlive the node-shared memory.
    entries.clear()
    memory.free()
    return rows


def _poll(handle: Any) -> object:
    return handle.test()


def _torch_poll(handle: Any) -> object:
    return handle.is_completed()


def _one(bench: BenchContext, start: Start, poll: Callable[[Any], object]) -> Row:
    """Time the operation alone, the computation alone, and both in two ways, in turns."""
    comm, rounds = bench.comm, (bench.options.iterations, bench.options.warmup)
    alone = statistics.times(
        interleave(comm, {"alone": lambda: lambda: start().wait()}, 3, 1)["alone"]
    ).median
    unit, units = computation(alone)
    # All ranks compute equally long: as many units as the slowest needs.
    units = int(slowest(comm, np.array([float(units)]))[0])

    def unpolled() -> None:
        handle = start()
        work(unit, units)
        handle.wait()

    def polled() -> None:
        handle = start()
        work(unit, units, lambda: poll(handle))
        handle.wait()

    ways: dict[str, Call] = {
        "alone": lambda: start().wait(),
        "compute": lambda: work(unit, units),
        "polled": polled,
        "unpolled": unpolled,
    }
    makes = {way: lambda call=call: call for way, call in ways.items()}
    seconds = interleave(comm, makes, *rounds)
    median = {way: statistics.times(found).median for way, found in seconds.items()}
    shares = {
        f"{way}_overlap": statistics.overlap(median["alone"], median["compute"], median[way])
        for way in ("polled", "unpolled")
    }
    return {f"{way}_seconds": value for way, value in median.items()} | shares
