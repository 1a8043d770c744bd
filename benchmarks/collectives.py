"""Compare all-reduce by `auto` with the MPI library and gloo in several MPIs. mpis.sh builds them.

    python benchmarks/collectives.py --environments openmpi=PATH,mpich=PATH [--sizes 64:256M:x4]

For each environment, way of buffers and element type it runs `mpirun -n 2 mpillm bench allreduce
--check`, in which the algorithms take turns round by round. A ratio is the peer's time over that of
`auto`: to the MPI library the median over rounds [quartiles], to gloo that of the medians.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LARGE_BYTES = 64 * 1024
OPEN_MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def bench(
    name: str, environment: Path, dtype: str, buffers: str, options: argparse.Namespace
) -> list[Row]:
    """Run `mpillm bench`; return the rows of `auto`, with their ratio to gloo added."""
    launch = ["mpirun", "-n", str(options.ranks)]
    if name.startswith("openmpi"):
        launch += ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    command = [
        *launch,
        "python",
        "-m",
        "mpillm",
        "bench",
        "allreduce",
        "--json",
        "--check",
        "--algorithms",
        f"{options.algorithm},mpi,gloo",
        "--sizes",
        options.sizes,
        "--dtype",
        dtype,
        "--buffers",
        buffers,
        "--iterations",
        str(options.iterations),
        *options.bench.split(),
    ]
    path = os.pathsep.join([str(environment / "bin"), os.environ["PATH"]])
    settings = os.environ | OPEN_MPI | {"PATH": path, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            command,
            env=settings,
            cwd=empty,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-3000:]}"
        )
    return own_rows(json.loads(done.stdout[done.stdout.index("{") :]), options.algorithm)


def own_rows(found: dict[str, Any], algorithm: str) -> list[Row]:
    rows = found["results"][0]["rows"]
    gloo = {row["bytes"]: row["median_seconds"] for row in rows if row["algorithm"] == "gloo"}

    def with_gloo(row: Row) -> Row:
        theirs = gloo.get(row["bytes"])
        return row | {"gloo_ratio": theirs / row["median_seconds"] if theirs else None}

    return [with_gloo(row) for row in rows if row["algorithm"] == algorithm]


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def print_row(row: Row) -> None:
    quarters = f"[{number(row['mpi_ratio_q1'], 2)}..{number(row['mpi_ratio_q3'], 2)}]"
    print(
        f"{row['mpi']:8s} {row['buffers']:6s} {row['element']:9s} {row['bytes']:12,d}  "
        f"{row['chosen']:15s}{1e6 * row['median_seconds']:12,.1f}  "
        f"{number(row['mpi_ratio'], 2):>6s} {quarters:17s}{number(row['gloo_ratio'], 1):>7s}  "
        f"{number(row['floor_ratio'], 2):>6s}  {row['wrong']:6d}",
        flush=True,
    )


def print_smallest(rows: list[Row]) -> None:
    """Print the smallest ratio to the MPI library, by MPI, buffers and type."""
    print("\nthe smallest ratio to the MPI library: at any size, and from 64 KiB up")
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["mpi"], row["buffers"], row["element"]), []).append(row)
    for (mpi, buffers, element), members in groups.items():
        least = min(row["mpi_ratio"] for row in members)
        large = min(
            (row["mpi_ratio"] for row in members if row["bytes"] >= LARGE_BYTES), default=None
        )
        print(f"{mpi:8s} {buffers:6s} {element:9s} {least:6.2f} {number(large, 2):>6s}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--environments",
        required=True,
        help="NAME=FOLDER,…; an Open MPI's name begins with openmpi",
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sizes", default="64:256M:x4")
    parser.add_argument("--dtypes", default="float32,bfloat16,float16")
    parser.add_argument("--buffers", default="warm,fresh")
    parser.add_argument("--algorithm", default="auto", help="the one that is compared")
    parser.add_argument(
        "--bench", default="--in-place", help="more options of bench; in place, as training sums"
    )
    parser.add_argument("--iterations", type=int, default=21)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    environments = dict(item.split("=", 1) for item in options.environments.split(","))
    print(
        f"{'MPI':8s} {'pages':6s} {'type':9s} {'bytes':>12s}  {'chosen':15s}{'median µs':>12s}  "
        f"{'× mpi':24s}{'× gloo':>7s}  floor  #wrong"
    )
    rows: list[Row] = []
    for name, folder in environments.items():
        for buffers in options.buffers.split(","):
            for dtype in options.dtypes.split(","):
                for row in bench(name, Path(folder), dtype, buffers, options):
                    rows.append(row | {"mpi": name, "buffers": buffers})
                    print_row(rows[-1])
    print_smallest(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    sys.exit(1 if any(row["wrong"] for row in rows) else 0)


if __name__ == "__main__":
    main()
