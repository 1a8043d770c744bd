"""What `mpillm bench` was asked for, checked before anything is measured."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from mpillm.bench.sizes import parse_sizes
from mpillm.comm.buffers import ELEMENTS
from mpillm.errors import UsageError
from mpillm.machine.cluster_profile import ALIASES

COLLECTIVES = {
    "allreduce": "allreduce",
    "reduce-scatter": "reduce_scatter",
    "allgather": "allgather",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "alltoall": "alltoall",
    "barrier": "barrier",
}
POINT_TO_POINT = ("latency", "bandwidth", "bibw", "message-rate")
BENCHMARKS = (*COLLECTIVES, *POINT_TO_POINT, "handover", "overlap", "memory", "gemm", "filesystem")
ALL = "all"
DEFAULT_SIZES = {
    **dict.fromkeys(COLLECTIVES, "1K:64M:x4"),
    **dict.fromkeys(POINT_TO_POINT, "1:4M:x4"),
    "handover": "64K:16M:x4",
    "overlap": "64K:16M:x4",
    "memory": "16K:64M:x4",
    "gemm": "128:2K:x2",
    "filesystem": "64M",
}
# What a matrix's edge may be: three of them in float32 take 12 GiB.
LARGEST_EDGE = 32 * 1024
STDOUT = "-"


@dataclass(frozen=True)
class BenchOptions:
    """The command line's settings; a wrong one raises UsageError."""

    what: str
    sizes: str = ""
    """As `sizes.py` reads them; "": each benchmark's own."""
    dtype: str = ""
    """One of ELEMENTS; "": float32, and for gemm both float32 and bfloat16."""
    algorithms: str = ""
    """Names with commas; "": all that can run here but the reference."""
    iterations: int = 20
    warmup: int = 3
    check: bool = False
    device: str = "cpu"
    in_place: bool = False
    buffers: str = "warm"
    op: str = "sum"
    node_shared: bool | None = None
    """Buffers in memory that the node shares; None: for auto and shared alone."""
    as_json: bool = False
    csv: str = ""
    plot: Path | None = None
    save: Path | None = None
    profile: Path | None = None
    folder: Path | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        _one_of("bench", self.what, (*BENCHMARKS, ALL))
        _one_of("--device", self.device, ("cpu", "cuda"))
        _one_of("--buffers", self.buffers, ("warm", "fresh"))
        _one_of("--op", self.op, ("sum", "mean", "max", "min"))
        if self.dtype:
            _one_of("--dtype", self.dtype, ELEMENTS)
        if self.iterations < 1 or self.warmup < 0:
            raise UsageError(
                f"a benchmark needs --iterations of 1 at least and --warmup of 0 at least, "
                f"not {self.iterations} and {self.warmup}"
            )
        if self.as_json and self.csv == STDOUT:
            raise UsageError("--json and --csv - both want the standard output; give --csv a file")
        for what in self.benchmarks():
            self.sizes_of(what)

    def benchmarks(self) -> tuple[str, ...]:
        return BENCHMARKS if self.what == ALL else (self.what,)

    def sizes_of(self, what: str) -> tuple[int, ...]:
        """Bytes, or for gemm the edges of the matrices. With `all` the user's sizes are those of the messages."""
        own = not self.sizes or (self.what == ALL and what in ("gemm", "memory", "filesystem"))
        sizes = parse_sizes(DEFAULT_SIZES[what] if own else self.sizes)
        if what == "gemm" and sizes[-1] > LARGEST_EDGE:
            raise UsageError(
                f"the --sizes of gemm are edges of square matrices, at most {LARGEST_EDGE:,}, not {sizes[-1]:,}; "
                f"write --sizes {DEFAULT_SIZES['gemm']}"
            )
        return sizes

    @property
    def element(self) -> str:
        return self.dtype or "float32"

    @property
    def algorithm_names(self) -> tuple[str, ...]:
        """The names as asked for, each once; a former name becomes the present one."""
        asked = [name.strip() for name in self.algorithms.split(",")]
        return tuple(dict.fromkeys(ALIASES.get(name, name) for name in asked if name))

    @property
    def quiet(self) -> bool:
        """Whether the standard output is a program's."""
        return self.as_json or self.csv == STDOUT


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = get_close_matches(value, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"{name} {value!r} is unknown; {hint}known: {', '.join(known)}")
