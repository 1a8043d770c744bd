"""Make the cluster profile, which `comm` reads, from a run's results, and save it."""

import fcntl
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mpillm.bench.bench_options import COLLECTIVES
from mpillm.bench.competitors import COPY, FLOOR, SHARED_PRIVATE
from mpillm.bench.peers import PEERS
from mpillm.bench.point_to_point import fastest
from mpillm.bench.results import Row, Section
from mpillm.machine.cluster_profile import (
    Cluster,
    ClusterProfile,
    CollectiveCost,
    Cost,
    PointToPointCost,
    Way,
)
from mpillm.system.atomic import is_special


def make_profile(
    sections: Sequence[Section],
    cluster: Cluster,
    ranks: int,
    device: str,
    made: str,
    probe: Mapping[str, Any],
) -> ClusterProfile:
    """Collect the costs of a run. `made`: the date; `probe`: facts of the GPU.

    Rows of peers and of `auto` are left out: no choice depends on them.
    """
    rows = {section.what: section.rows for section in sections}
    collectives = [
        entry
        for what in COLLECTIVES
        for entry in collective_costs(rows.get(what, []), cluster, ranks, device)
    ]
    return ClusterProfile(
        made,
        cluster,
        tuple(collectives),
        tuple(point_to_point_costs(rows)),
        memory(rows),
        tuple(gemm(rows, device)),
        filesystem(rows),
        dict(probe),
        handover(rows),
    )


Mark = tuple[int, int, int] | None


@dataclass(frozen=True)
class SavedProfile:
    """The place of --save, with the mark of the file that was there before the run."""

    path: Path
    before: Mark

    @classmethod
    def find(cls, path: Path) -> "SavedProfile":
        return cls(path, _mark(path))

    def write(self, profile: ClusterProfile) -> Path:
        """Write `profile` and return its place. One rank calls it. Raises UsageError.

        Of two runs with one --save the first to end has the path. The other one's file gets the
        next free name, such as cluster-2.json: nothing that was measured is lost.
        """
        if is_special(self.path):
            profile.save(self.path)
            return self.path
        with _one_at_a_time(self.path):
            free, number = self.path, 2
            while _mark(free) not in ({self.before} if free == self.path else {None}):
                free = self.path.with_stem(f"{self.path.stem}-{number}")
                number += 1
            profile.save(free)
        return free


def _mark(path: Path) -> Mark:
    """Identify a file's contents: a replaced file has another inode; None without a file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Lock the folder of `path` while the block looks and writes; not where locks fail."""
    descriptor = os.open(os.path.realpath(path.parent), os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def cost_of(rows: Sequence[Row]) -> Cost:
    """Fit rows with `bytes` and `median_seconds`, at least one, into points and a line."""
    points = tuple(sorted((row["bytes"], row["median_seconds"]) for row in rows))
    line = fit(points)
    return Cost(points, line.latency_seconds, line.bytes_per_second, line.relative_error)


def collective_costs(
    rows: Sequence[Row], cluster: Cluster, ranks: int, device: str
) -> list[CollectiveCost]:
    names = dict.fromkeys(row["algorithm"] for row in rows)
    kept = [name for name in names if name not in ("auto", FLOOR, *PEERS)]
    found = []
    for name in kept:
        own = [row for row in rows if row["algorithm"] == name]
        found.append(
            CollectiveCost(
                own[0]["operation"],
                "shared" if name == SHARED_PRIVATE else name,
                own[0]["element"],
                device,
                cluster.nodes,
                ranks,
                cluster.ranks_per_node,
                own[0]["node_shared"],
                cost_of(own),
            )
        )
    return found


def point_to_point_costs(rows: Mapping[str, list[Row]]) -> list[PointToPointCost]:
    latency = rows.get("latency", [])
    found = []
    for level in dict.fromkeys(row["level"] for row in latency):
        best = {
            what: fastest(what, rows.get(what, []), level)
            for what in ("bandwidth", "bibw", "message-rate")
        }
        found.append(
            PointToPointCost(
                level,
                cost_of([row for row in latency if row["level"] == level]),
                best["bandwidth"],
                best["bibw"],
                best["message-rate"],
            )
        )
    return found


def handover(rows: Mapping[str, list[Row]]) -> dict[Way, Cost]:
    """Map each way within a node to the cost of a message whose sender computes."""
    found: dict[Way, Cost] = {}
    for way in get_args(Way):
        own = [
            row for row in rows.get("handover", []) if (row["level"], row["way"]) == ("node", way)
        ]
        if own:
            found[way] = cost_of(
                [
                    {"bytes": row["bytes"], "median_seconds": row["behind_work_seconds"]}
                    for row in own
                ]
            )
    return found


def memory(rows: Mapping[str, list[Row]]) -> dict[str, Any]:
    """Map each kernel to a rank's bytes a second, all ranks at once, at the largest size.

    `floor`: (bytes, seconds) of a copy.
    """
    found: dict[str, Any] = {}
    for row in rows.get("memory", []):  # sizes ascend
        found[f"{row['kernel']}_bytes_per_second"] = row["bytes_per_second"]
    copies = {
        row["bytes"]: row["median_seconds"]
        for row in rows.get("memory", [])
        if row["kernel"] == "copy"
    }
    for what in COLLECTIVES:
        floors = [
            row for row in rows.get(what, []) if row["algorithm"] == FLOOR and row["chosen"] == COPY
        ]
        copies = {row["bytes"]: row["median_seconds"] for row in floors} | copies
    return found | ({"floor": [[size, copies[size]] for size in sorted(copies)]} if copies else {})


def gemm(rows: Mapping[str, list[Row]], device: str) -> list[dict[str, Any]]:
    return [
        {
            "element": row["element"],
            "edge": row["edge"],
            "device": device,
            "flops_per_second": row["flops_per_second"],
        }
        for row in rows.get("gemm", [])
    ]


def filesystem(rows: Mapping[str, list[Row]]) -> dict[str, Any]:
    """Map keys such as `read_windows_cold_bytes_per_second` to rates of all ranks, at the largest
    size.
    """
    return {
        row["path"].replace(",", "").replace(" ", "_") + "_bytes_per_second": row[
            "all_bytes_per_second"
        ]
        for row in rows.get("filesystem", [])
    }


@dataclass(frozen=True)
class Fit:
    """`bytes_per_second` is None where the times do not grow with the bytes.

    `relative_error`: the root of the mean square of (fitted − measured) / measured.
    """

    latency_seconds: float
    bytes_per_second: float | None
    relative_error: float

    def seconds(self, nbytes: float) -> float:
        return self.latency_seconds + (
            nbytes / self.bytes_per_second if self.bytes_per_second else 0.0
        )


def fit(points: Sequence[tuple[float, float]]) -> Fit:
    """Fit seconds = latency + bytes / rate (Hockney 1994) by least squares on relative error.

    `points`: (bytes, seconds > 0), at least one; latency and slope are zero or more. In absolute
    error the largest size alone would decide.
    """
    # With weights w = 1/t² the normal equations of Σ w (a + b n − t)².
    weights = [1 / seconds**2 for _, seconds in points]
    w = sum(weights)
    wn = sum(weight * n for weight, (n, _) in zip(weights, points, strict=True))
    wnn = sum(weight * n * n for weight, (n, _) in zip(weights, points, strict=True))
    wt = sum(weight * t for weight, (_, t) in zip(weights, points, strict=True))
    wnt = sum(weight * n * t for weight, (n, t) in zip(weights, points, strict=True))
    determinant = w * wnn - wn * wn
    latency, slope = wt / w, 0.0
    if determinant > 1e-12 * w * wnn:
        latency, slope = (wt * wnn - wnt * wn) / determinant, (w * wnt - wn * wt) / determinant
    if latency < 0:
        latency, slope = 0.0, wnt / wnn
    elif slope <= 0:
        latency, slope = wt / w, 0.0
    errors = [((latency + slope * n) / t - 1) ** 2 for n, t in points]
    return Fit(latency, 1 / slope if slope else None, math.sqrt(sum(errors) / len(errors)))
