"""Memory as STREAM measures it (McCalpin 1995), all ranks at once, and the rate of a write alone."""

from typing import Any

from mpillm.bench import figures
from mpillm.bench.context import Bench
from mpillm.bench.results import TIME_COLUMNS, Row, Section, Show, scaled, text, whole
from mpillm.bench.timing import Call, interleave

MOVED = {"copy": 2, "scale": 2, "add": 3, "triad": 3, "write": 1}
"""How many arrays each kernel reads and writes; what a cache fetches before a write is not counted, as in STREAM."""
COLUMNS: dict[str, Show] = {
    "kernel": text("kernel"),
    "bytes": whole("bytes"),
    **TIME_COLUMNS,
    "GB/s a rank": scaled("bytes_per_second", 1e-9),
    "GB/s all": scaled("all_bytes_per_second", 1e-9),
}


def kernels(a: Any, b: Any, c: Any) -> dict[str, Call]:
    """On three torch tensors of one shape."""
    import torch

    return {
        "copy": lambda: c.copy_(a),
        "scale": lambda: torch.mul(c, 3.0, out=b),
        "add": lambda: torch.add(a, b, out=c),
        "triad": lambda: torch.add(b, c, alpha=3.0, out=a),
        "write": lambda: a.fill_(1.0),
    }


def run_memory(bench: Bench) -> list[Section]:
    """Each kernel on arrays of each size, by every rank at once. Every rank calls it."""
    import torch

    options, comm, rows = bench.options, bench.comm, list[Row]()
    sizes = options.sizes_of("memory")
    with bench.progress("memory", len(sizes) * (options.iterations + options.warmup)) as advance:
        for size in sizes:
            arrays = [torch.ones(max(1, size // 8), dtype=torch.float64) for _ in range(3)]
            calls = kernels(*arrays)
            makes = {name: lambda call=call: call for name, call in calls.items()}
            seconds = interleave(comm, makes, options.iterations, options.warmup, advance=advance)
            nbytes = len(arrays[0]) * 8
            for name, own in seconds.items():
                times = figures.times(own)
                speed = figures.rate(MOVED[name] * nbytes, times.median)
                rows.append(
                    {
                        "kernel": name,
                        "bytes": nbytes,
                        **times.row(),
                        "bytes_per_second": speed,
                        "all_bytes_per_second": comm.size * speed,
                    }
                )
    return [
        Section(
            "memory",
            f"memory: {comm.size} ranks at once, three arrays of float64 each",
            rows,
            COLUMNS,
        )
    ]
