"""Multiply square matrices, all ranks at once: the upper bound of a model's layers."""

from collections.abc import Sequence

import numpy as np

from mpillm.bench import statistics
from mpillm.bench.context import BenchContext
from mpillm.bench.results import TIME_COLUMNS, Row, Section, Show, scaled, text, whole
from mpillm.bench.timing import Call, interleave
from mpillm.errors import UsageError
from mpillm.system.extras import install_command, installed, require_packages

# Processors without bfloat16 are a hundred times slower at it: minutes for one large edge.
LONGEST_SECONDS = 1.0
FLOATS = ("float32", "bfloat16", "float16", "float64")
COLUMNS: dict[str, Show] = {
    "type": text("element"),
    "edge": whole("edge"),
    **TIME_COLUMNS,
    "GFLOP/s a rank": scaled("flops_per_second", 1e-9),
    "GFLOP/s all": scaled("all_flops_per_second", 1e-9),
}


def run_gemm(bench: BenchContext) -> list[Section]:
    """Time each edge in each float type.

    Every rank calls it. Raises UsageError for integer types.
    """
    options, comm, rows = bench.options, bench.comm, list[Row]()
    if options.dtype and options.dtype not in FLOATS and options.what == "gemm":
        raise UsageError(
            f"gemm multiplies floats, not --dtype {options.dtype}; take one of {', '.join(FLOATS)}"
        )
    elements, edges = _elements(bench), options.sizes_of("gemm")
    with bench.progress("gemm", len(edges) * (options.iterations + options.warmup)) as advance:
        for edge in edges:
            calls = {
                element: multiplier(element, edge, options.device)
                for element in _bearable(bench, elements, edge, rows)
            }
            makes = {element: lambda call=call: call for element, call in calls.items()}
            if not makes:
                break
            seconds = interleave(comm, makes, options.iterations, options.warmup, advance=advance)
            rows += [
                _row(element, edge, comm.size, statistics.times(own))
                for element, own in seconds.items()
            ]
    title = f"gemm: {comm.size} rank{'s' * (comm.size > 1)} at once, {options.threads} threads each"
    return [Section("gemm", title, rows, COLUMNS)]


def _elements(bench: BenchContext) -> tuple[str, ...]:
    """Name the types to multiply: the one that was asked for, else float32 and bfloat16."""
    asked = bench.options.dtype
    elements = (asked,) if asked in FLOATS else FLOATS[:2]
    if installed("torch"):
        return elements
    if asked == "bfloat16":
        require_packages("gemm in bfloat16", "torch")
    bench.note(
        "gemm: by NumPy, with the threads of OMP_NUM_THREADS and without bfloat16: "
        f"torch is not installed ({install_command('torch')})"
    )
    return tuple(element for element in elements if element != "bfloat16")


def multiplier(element: str, edge: int, device: str) -> Call:
    """Make the call that multiplies two square matrices of ones; NumPy does it without torch."""
    if not installed("torch"):
        a, b, c = (np.ones((edge, edge), element) for _ in range(3))
        return lambda: np.matmul(a, b, out=c)
    import torch

    left, right, out = (
        torch.ones(edge, edge, dtype=getattr(torch, element), device=device) for _ in range(3)
    )
    if device != "cuda":
        return lambda: torch.mm(left, right, out=out)

    def finished() -> None:
        torch.mm(left, right, out=out)
        torch.cuda.synchronize()

    return finished


def _bearable(
    bench: BenchContext, elements: Sequence[str], edge: int, rows: Sequence[Row]
) -> list[str]:
    """Select the types whose product of this edge is fast enough, extrapolated from a smaller edge.

    The same on all ranks.
    """
    kept = []
    for element in elements:
        before = next((row for row in reversed(rows) if row["element"] == element), None)
        if before and before["median_seconds"] * (edge / before["edge"]) ** 3 > LONGEST_SECONDS:
            bench.note(f"gemm: {element} is too slow here for edges beyond {before['edge']:,}")
        else:
            kept.append(element)
    return kept


def _row(element: str, edge: int, ranks: int, times: statistics.Times) -> Row:
    speed = statistics.rate(2 * edge**3, times.median)
    return {
        "element": element,
        "edge": edge,
        **times.row(),
        "flops_per_second": speed,
        "all_flops_per_second": ranks * speed,
    }
