"""The options of `mpillm bench`, checked before anything is measured."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

from mpillm.comm.buffers import ELEMENTS
from mpillm.errors import UsageError
from mpillm.machine.cluster_profile import ALIASES
from mpillm.system.command_line import Argument, Json, Option

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
# Three matrices of this edge in float32 take 12 GiB.
LARGEST_EDGE = 32 * 1024
STDOUT = Path("-")
MPI_LIBRARY = "mpi"
"""The MPI library's own algorithm."""
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
MOST_SIZES = 1000
# The time of each round is kept, and its statistics are of all of them.
MOST_ROUNDS = 10_000_000
LARGEST_BYTES = 1 << 40
REMEDY = (
    "write --sizes as 1K:256M:x2 (first:last:factor), 1M:4M:+1M (first:last:step) "
    "or a list such as 64,1M,4M"
)


@dataclass(frozen=True)
class BenchOptions:
    """Hold the settings of the command line; a wrong one raises UsageError."""

    what: Annotated[
        str,
        Argument(f"{', '.join(BENCHMARKS)}, or {ALL}.", metavar="WHAT"),
    ]
    sizes: Annotated[str, Option("1K:256M:x2, 1M:4M:+1M or a list such as 64,1M.")] = ""
    dtype: Annotated[str, Option("float32, bfloat16, int32 …; float32 where none is named.")] = ""
    algorithms: Annotated[
        str, Option("auto,mpi,shared,ring,gloo …; all that can run where none is named.")
    ] = ""
    iterations: Annotated[int, Option("Rounds that are timed.", minimum=1, maximum=MOST_ROUNDS)] = (
        20
    )
    warmup: Annotated[int, Option("Rounds before them.", minimum=0, maximum=MOST_ROUNDS)] = 3
    check: Annotated[bool, Option("Count wrong elements.")] = False
    device: Annotated[str, Option("cpu or cuda.")] = "cpu"
    in_place: Annotated[bool, Option("The result replaces the data.")] = False
    buffers: Annotated[str, Option("warm: the same each time; fresh: new pages each time.")] = (
        "warm"
    )
    op: Annotated[str, Option("sum, mean, max or min.")] = "sum"
    node_shared: Annotated[
        bool | None,
        Option(
            "Where the data is; by default node-shared for auto and shared.",
            flag="--node-shared/--private",
        ),
    ] = None
    as_json: Json = False
    csv: Annotated[
        Path | None, Option("Write the figures; - prints them instead.", metavar="FILE")
    ] = None
    plot: Annotated[Path | None, Option("Draw bandwidth over size.", metavar="FILE.png")] = None
    save: Annotated[Path | None, Option("Write the cluster profile.", metavar="PROFILE.json")] = (
        None
    )
    profile: Annotated[Path | None, Option("Let auto choose by it.", metavar="PROFILE.json")] = None
    folder: Annotated[Path | None, Option("Which file system to measure.", metavar="DIR")] = None
    threads: int = 1
    """Threads of this rank; not an option: the verb counts them."""

    def __post_init__(self) -> None:
        _one_of("bench", self.what, (*BENCHMARKS, ALL))
        _one_of("--device", self.device, ("cpu", "cuda"))
        _one_of("--buffers", self.buffers, ("warm", "fresh"))
        _one_of("--op", self.op, ("sum", "mean", "max", "min"))
        if self.dtype:
            _one_of("--dtype", self.dtype, ELEMENTS)
        if self.iterations < 1 or self.warmup < 0:
            raise UsageError(
                f"--iterations is 1 or more and --warmup 0 or more, "
                f"got {self.iterations} and {self.warmup}"
            )
        if self.as_json and self.csv == STDOUT:
            raise UsageError("--json and --csv - both want the standard output; give --csv a file")
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            raise UsageError(f"--plot draws a PNG; end the name {self.plot} in .png")
        for what in self.benchmarks():
            self.sizes_of(what)

    def benchmarks(self) -> tuple[str, ...]:
        return BENCHMARKS if self.what == ALL else (self.what,)

    def sizes_of(self, what: str) -> tuple[int, ...]:
        """Give the sizes in bytes, or for gemm the edges of the matrices.

        With `all` the user's sizes are those of the messages.
        """
        own = not self.sizes or (self.what == ALL and what in ("gemm", "memory", "filesystem"))
        sizes = parse_sizes(DEFAULT_SIZES[what] if own else self.sizes)
        if what == "gemm" and sizes[-1] > LARGEST_EDGE:
            raise UsageError(
                f"the --sizes of gemm are edges of square matrices, at most {LARGEST_EDGE:,}, "
                f"not {sizes[-1]:,}; "
                f"write --sizes {DEFAULT_SIZES['gemm']}"
            )
        return sizes

    @property
    def element(self) -> str:
        return self.dtype or "float32"

    @property
    def algorithm_names(self) -> tuple[str, ...]:
        """The names as asked for, each once, aliases resolved."""
        names = (name.strip() for name in self.algorithms.split(","))
        return tuple(dict.fromkeys(ALIASES.get(name, name) for name in names if name))

    @property
    def csv_file(self) -> Path | None:
        """The file of --csv; None where the figures are printed instead."""
        return None if self.csv == STDOUT else self.csv

    @property
    def quiet(self) -> bool:
        """True where a program reads the standard output."""
        return self.as_json or self.csv == STDOUT


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = get_close_matches(value, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"{name} {value!r} is unknown; {hint}known: {', '.join(known)}")


def parse_sizes(text: str) -> tuple[int, ...]:
    """Parse `1K:256M:x2`, `64,1M,4M` or `0.5M:4M:+512K`, K, M and G binary: ascending, each once.

    Raises UsageError.
    """
    sizes: set[int] = set()
    for item in text.split(","):
        sizes.update(_series(item, text))
        if len(sizes) > MOST_SIZES:
            raise UsageError(
                f"--sizes {text} names more than {MOST_SIZES:,} sizes; take a larger step"
            )
    return tuple(sorted(sizes))


def _series(item: str, text: str) -> list[int]:
    parts = item.split(":")
    if len(parts) > 3:
        raise UsageError(
            f"--sizes {text}: {item!r} has {len(parts)} parts, at most three; {REMEDY}"
        )
    first, last = _size(parts[0], text), _size(parts[-1 if len(parts) < 3 else 1], text)
    if last < first:
        raise UsageError(
            f"--sizes {text}: {item!r} ends below its start, {last:,} < {first:,}; {REMEDY}"
        )
    factor, step = _stride(parts[2] if len(parts) == 3 else "x2", text)
    found: list[int] = []
    size = first
    while size <= last and len(found) <= MOST_SIZES:
        found.append(size)
        size = max(size + 1, int(size * factor) + step)
    return found


def _stride(text: str, whole: str) -> tuple[float, int]:
    """`x2` → (2, 0), `+1M` → (1, 1048576)."""
    kind, rest = text[:1], text[1:]
    if kind == "+":
        return 1.0, _size(rest, whole)
    if kind != "x" or not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", rest) or float(rest) <= 1:
        raise UsageError(
            f"--sizes {whole}: {text!r} is neither x and a factor above 1 nor + and a size; "
            f"{REMEDY}"
        )
    return float(rest), 0


def _size(text: str, whole: str) -> int:
    match = re.fullmatch(
        r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([kmg]?)(?:i?b)?\s*", text.lower(), re.ASCII
    )
    if match is None:
        raise UsageError(f"--sizes {whole}: {text!r} is not a size; {REMEDY}")
    size = int(float(match[1]) * UNITS[match[2]])
    if not 1 <= size <= LARGEST_BYTES:
        raise UsageError(
            f"--sizes {whole}: {text!r} is {size:,}, outside 1 to {LARGEST_BYTES:,}; {REMEDY}"
        )
    return size
