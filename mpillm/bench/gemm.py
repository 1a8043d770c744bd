"""Square matrix products with this rank's threads, all ranks at once: the rate that a model's layers can hope for."""

from collections.abc import Sequence

from mpillm.bench import figures
from mpillm.bench.context import Bench
from mpillm.bench.results import TIME_COLUMNS, Row, Section, Show, scaled, text, whole
from mpillm.bench.timing import interleave
from mpillm.errors import UsageError

# Processors without bfloat16 multiply it a hundred times slower than float32: minutes for one large edge.
LONGEST_SECONDS = 1.0
FLOATS = ("float32", "bfloat16", "float16", "float64")
COLUMNS: dict[str, Show] = {
    "type": text("element"),
    "edge": whole("edge"),
    **TIME_COLUMNS,
    "GFLOP/s a rank": scaled("flops_per_second", 1e-9),
    "GFLOP/s all": scaled("all_flops_per_second", 1e-9),
}


def run_gemm(bench: Bench) -> list[Section]:
    """Each edge in each float type. Every rank calls it. Raises UsageError for a type that is no float."""
    import torch

    options, comm, rows = bench.options, bench.comm, list[Row]()
    if options.dtype and options.dtype not in FLOATS and options.what == "gemm":
        raise UsageError(
            f"gemm multiplies floats, not --dtype {options.dtype}; take one of {', '.join(FLOATS)}"
        )
    elements = (options.dtype,) if options.dtype in FLOATS else FLOATS[:2]
    edges, cuda = options.sizes_of("gemm"), options.device == "cuda"
    with bench.progress("gemm", len(edges) * (options.iterations + options.warmup)) as advance:
        for edge in edges:
            makes = {}
            for element in _bearable(bench, elements, edge, rows):
                left, right, out = (
                    torch.ones(edge, edge, dtype=getattr(torch, element), device=options.device)
                    for _ in range(3)
                )

                def call(
                    left: torch.Tensor = left, right: torch.Tensor = right, out: torch.Tensor = out
                ) -> None:
                    torch.mm(left, right, out=out)
                    if cuda:
                        torch.cuda.synchronize()

                makes[element] = lambda call=call: call
            if not makes:
                break
            seconds = interleave(comm, makes, options.iterations, options.warmup, advance=advance)
            rows += [
                _row(element, edge, comm.size, figures.times(own))
                for element, own in seconds.items()
            ]
    title = f"gemm: {comm.size} rank{'s' * (comm.size > 1)} at once, {options.threads} threads each"
    return [Section("gemm", title, rows, COLUMNS)]


def _bearable(bench: Bench, elements: Sequence[str], edge: int, rows: Sequence[Row]) -> list[str]:
    """The types whose product of this edge will not take too long, by that of a smaller one; the same on all ranks."""
    kept = []
    for element in elements:
        before = next((row for row in reversed(rows) if row["element"] == element), None)
        if before and before["median_seconds"] * (edge / before["edge"]) ** 3 > LONGEST_SECONDS:
            bench.note(f"gemm: {element} is too slow here for edges beyond {before['edge']:,}")
        else:
            kept.append(element)
    return kept


def _row(element: str, edge: int, ranks: int, times: figures.Times) -> Row:
    speed = figures.rate(2 * edge**3, times.median)
    return {
        "element": element,
        "edge": edge,
        **times.row(),
        "flops_per_second": speed,
        "all_flops_per_second": ranks * speed,
    }
