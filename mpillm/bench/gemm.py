"""Square matrix products with this rank's threads, all ranks at once: the rate that a model's layers can hope for."""

from mpillm.bench import figures
from mpillm.bench.report import TIME_COLUMNS, Row, Section, Show, scaled, text, whole
from mpillm.bench.setting import Bench
from mpillm.bench.timing import interleave
from mpillm.errors import UsageError

FLOATS = ("float32", "bfloat16", "float16", "float64")
COLUMNS: dict[str, Show] = {
    "type": text("element"), "edge": whole("edge"), **TIME_COLUMNS,
    "GFLOP/s a rank": scaled("flops_per_second", 1e-9), "GFLOP/s all": scaled("all_flops_per_second", 1e-9),
}  # fmt: skip


def run_gemm(bench: Bench) -> list[Section]:
    """Each edge in each float type. Every rank calls it. Raises UsageError for a type that is no float."""
    import torch

    options, comm, rows = bench.options, bench.comm, list[Row]()
    if options.dtype and options.dtype not in FLOATS and options.what == "gemm":
        raise UsageError(f"gemm multiplies floats, not --dtype {options.dtype}; take one of {', '.join(FLOATS)}")
    elements = (options.dtype,) if options.dtype in FLOATS else FLOATS[:2]
    edges, cuda = options.sizes_of("gemm"), options.device == "cuda"
    with bench.progress("gemm", len(edges) * (options.iterations + options.warmup)) as advance:
        for edge in edges:
            makes = {}
            for element in elements:
                left, right, out = (
                    torch.ones(edge, edge, dtype=getattr(torch, element), device=options.device) for _ in range(3)
                )

                def call(left: torch.Tensor = left, right: torch.Tensor = right, out: torch.Tensor = out) -> None:
                    torch.mm(left, right, out=out)
                    if cuda:
                        torch.cuda.synchronize()

                makes[element] = lambda call=call: call
            seconds = interleave(comm, makes, options.iterations, options.warmup, advance=advance)
            rows += [_row(element, edge, comm.size, figures.times(own)) for element, own in seconds.items()]
    title = f"gemm: {comm.size} rank{'s' * (comm.size > 1)} at once, {options.threads} threads each"
    return [Section("gemm", title, rows, COLUMNS)]


def _row(element: str, edge: int, ranks: int, times: figures.Times) -> Row:
    speed = figures.rate(2 * edge**3, times.median)
    return {
        "element": element, "edge": edge, **times.row(), "flops_per_second": speed,
        "all_flops_per_second": ranks * speed,
    }  # fmt: skip
