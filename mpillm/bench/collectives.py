"""Time every algorithm of one collective, size by size, with the MPI library's and the memory
floor.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mpillm.bench import statistics
from mpillm.bench.bench_options import COLLECTIVES, MPI_LIBRARY
from mpillm.bench.competitors import (
    FLOOR,
    ArrayMemory,
    Competitor,
    competitors,
    floor,
    floor_kind,
    peers_wanted,
    runnable,
    select,
    tried,
)
from mpillm.bench.context import BenchContext
from mpillm.bench.pattern import count_wrong
from mpillm.bench.peers import Peer, joined
from mpillm.bench.results import TIME_COLUMNS, Row, Section, Show, scaled, spread, text, whole
from mpillm.bench.sample_arrays import Shape, fitting_count
from mpillm.bench.statistics import Seconds
from mpillm.bench.timing import interleave
from mpillm.comm.algorithms.schedule import REDUCING

COLUMNS: dict[str, Show] = {
    "bytes": whole("bytes"),
    "count": whole("count"),
    "type": text("element"),
    "algorithm": lambda row: (
        row["algorithm"] + f" ({row['chosen']})" * (row["algorithm"] in ("auto", FLOOR))
    ),
    **TIME_COLUMNS,
    "algbw GB/s": scaled("algorithm_bytes_per_second", 1e-9),
    "busbw GB/s": scaled("bus_bytes_per_second", 1e-9),
    "#wrong": text("wrong"),
    "× mpi": spread("mpi_ratio"),
    "of floor": scaled("floor_ratio", 1),
}


def run_collective(bench: BenchContext, what: str) -> list[Section]:
    """Measure the collective that the command line calls `what`.

    Every rank calls it, with the same options.
    """
    options, operation = bench.options, COLLECTIVES[what]
    here = runnable(bench.group, operation, options)
    names = select(options.algorithm_names, here, bench.note, what)
    shapes = shapes_of(bench, what)
    rows: list[Row] = []
    with (
        joined(
            bench.comm, peers_wanted(options), bench.note, bench.group.node_map.on_one_node
        ) as peers,
        bench.progress(what, len(shapes) * (options.iterations + options.warmup)) as advance,
    ):
        for shape in shapes:
            rows += _measure(bench, shape, names, peers, advance)
    title = f"{what}: {bench.comm.size} rank{'s' * (bench.comm.size > 1)}" + f", {options.op}" * (
        operation in REDUCING
    )
    return [Section(what, title, rows, COLUMNS)]


def shapes_of(bench: BenchContext, what: str) -> list[Shape]:
    """List the shapes to measure by size, each element count once."""
    options, comm, operation = bench.options, bench.comm, COLLECTIVES[what]
    sizes = (0,) if operation == "barrier" else options.sizes_of(what)
    counts = [
        fitting_count(operation, size, options.element, comm.size) if size else 0 for size in sizes
    ]
    op = options.op if operation in REDUCING else "sum"
    return [
        Shape(operation, count, options.element, comm.size, comm.rank, options.in_place, op)
        for count in dict.fromkeys(counts)
    ]


def _measure(
    bench: BenchContext,
    shape: Shape,
    names: list[str],
    peers: Mapping[str, Peer],
    advance: Callable[[], None],
) -> list[Row]:
    options, group = bench.options, bench.group
    memory = ArrayMemory(group, shape, options)
    entries = competitors(group, peers, memory, names, options)
    chosen = keep_able(bench, entries)
    wrong = _check(bench, entries) if options.check else {}
    makes = {name: entry.make for name, entry in entries.items()}
    if shape.count and options.device == "cpu":
        makes[FLOOR] = floor(shape)
    seconds = interleave(
        bench.comm,
        makes,
        options.iterations,
        options.warmup,
        fresh=options.buffers == "fresh",
        advance=advance,
    )
    # Again after the timing: a reused buffer may be wrong from the second call on only.
    if options.check:
        after = _check(bench, entries)
        wrong = {name: max(before, after[name]) for name, before in wrong.items()}
    facts = {name: {"chosen": chosen[name], "wrong": wrong.get(name)} for name in entries}
    facts = {name: fact | {"node_shared": memory.is_shared(name)} for name, fact in facts.items()}
    # The calls hold views of node-shared memory: they must go before it is freed.
    entries.clear()
    makes.clear()
    memory.free()
    return rows_of(shape, seconds, facts)


def keep_able(bench: BenchContext, entries: dict[str, Competitor]) -> dict[str, str]:
    """Remove those of `entries` that cannot run here, with a note.

    Gives the others' names with the algorithm that each chose.
    """
    chosen = {}
    for name in list(entries):
        chosen[name], reason = tried(bench.group, entries[name])
        if reason:
            shape = entries.pop(name).memory.shape
            bench.note(f"{name} is left out of {shape.operation} in {shape.element}: {reason}")
    return chosen


def _check(bench: BenchContext, entries: Mapping[str, Competitor]) -> dict[str, int]:
    """Count the wrong elements of all ranks together, by algorithm."""
    counts = {}
    for name, entry in entries.items():
        shape = entry.memory.shape
        result, _ = entry.try_out()
        mine = count_wrong(
            shape.operation, result, shape.bounds, shape.rank, shape.element, shape.op, shape.root
        )
        counts[name] = int(bench.comm.allreduce(mine))
    return counts


def rows_of(shape: Shape, seconds: Mapping[str, Seconds], facts: Mapping[str, Row]) -> list[Row]:
    """Make the rows of one size from the times of each competitor, the floor included."""
    library, memory = seconds.get(MPI_LIBRARY), seconds.get(FLOOR)
    least = None
    if memory is not None and shape.ranks > 1:
        least = statistics.times(memory).median * statistics.floor_share(
            shape.operation, shape.ranks
        )
    rows = []
    for name, own in seconds.items():
        row: dict[str, Any] = {
            "operation": shape.operation,
            "bytes": shape.nbytes,
            "count": shape.count,
            "element": shape.element,
            "algorithm": name,
            "chosen": floor_kind(shape) if name == FLOOR else name,
            "wrong": None,
            "node_shared": False,
            **facts.get(name, {}),
        }
        row |= statistics.collective_row(shape.operation, shape.nbytes, shape.ranks, own)
        row |= {"mpi_ratio": None, "mpi_ratio_q1": None, "mpi_ratio_q3": None}
        if library is not None and name != FLOOR:
            row |= statistics.ratios(library, own)
        if name == FLOOR:
            # A pass over local memory sends nothing: it has no bus bandwidth.
            row["bus_bytes_per_second"] = None
        row["floor_ratio"] = least / row["median_seconds"] if least and name != FLOOR else None
        rows.append(row)
    return rows
