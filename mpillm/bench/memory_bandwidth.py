"""Measure memory as STREAM does (McCalpin 1995), all ranks at once, and a write alone."""

import numpy as np

from mpillm.bench import statistics
from mpillm.bench.context import BenchContext
from mpillm.bench.results import TIME_COLUMNS, Row, Section, Show, scaled, text, whole
from mpillm.bench.timing import Call, interleave
from mpillm.system.extras import install_command, installed

MOVED = {"copy": 2, "scale": 2, "add": 3, "triad": 3, "write": 1}
"""Arrays that each kernel reads and writes; as in STREAM without the fetch before a write."""
COLUMNS: dict[str, Show] = {
    "kernel": text("kernel"),
    "bytes": whole("bytes"),
    **TIME_COLUMNS,
    "GB/s a rank": scaled("bytes_per_second", 1e-9),
    "GB/s all": scaled("all_bytes_per_second", 1e-9),
}


def kernels(count: int) -> dict[str, Call]:
    """Make each kernel's call on three arrays of `count` float64; NumPy, without torch, lacks
    triad.
    """
    if not installed("torch"):
        x, y, z = (np.ones(count) for _ in range(3))
        return {
            "copy": lambda: np.copyto(z, x),
            "scale": lambda: np.multiply(z, 3.0, out=y),
            "add": lambda: np.add(x, y, out=z),
            "write": lambda: x.fill(1.0),
        }
    import torch

    # float64, as in STREAM.
    a, b, c = (torch.ones(count, dtype=torch.float64) for _ in range(3))
    return {
        "copy": lambda: c.copy_(a),
        "scale": lambda: torch.mul(c, 3.0, out=b),
        "add": lambda: torch.add(a, b, out=c),
        "triad": lambda: torch.add(b, c, alpha=3.0, out=a),
        "write": lambda: a.fill_(1.0),
    }


def run_memory(bench: BenchContext) -> list[Section]:
    """Time each kernel on arrays of each size, all ranks at once. Every rank calls it."""
    options, comm, rows = bench.options, bench.comm, list[Row]()
    sizes = options.sizes_of("memory")
    if not installed("torch"):
        bench.note(
            "memory: by NumPy with one thread a rank and without triad: "
            f"torch is not installed ({install_command('torch')})"
        )
    with bench.progress("memory", len(sizes) * (options.iterations + options.warmup)) as advance:
        for size in sizes:
            count = max(1, size // 8)
            calls = kernels(count)
            makes = {name: lambda call=call: call for name, call in calls.items()}
            seconds = interleave(comm, makes, options.iterations, options.warmup, advance=advance)
            nbytes = count * 8
            for name, own in seconds.items():
                times = statistics.times(own)
                speed = statistics.rate(MOVED[name] * nbytes, times.median)
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
