"""The cluster profile: what `mpillm bench --save` measured, a JSON file that the choice of algorithms reads.

    {"schema": "mpillm cluster profile", "version": 1, "made": DATE, "cluster": {…}, "collectives": [{…}, …],
     "point_to_point": [{…}, …], "memory": {…}, "gemm": [{…}, …], "filesystem": {…}, "gpu_probe": {…},
     "handover": {"shared": {…}, "messages": {…}}}

docs/bench.md tells every key. Sizes are bytes, times seconds, rates bytes a second.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast, get_args

from mpillm.comm.mesh import hosts, local_ranks
from mpillm.errors import UsageError
from mpillm.machine.cpu import processor
from mpillm.system.atomic import write_json

if TYPE_CHECKING:
    from mpi4py import MPI

SCHEMA, VERSION = "mpillm cluster profile", 1
WAY_OUT = "make one with `mpirun … mpillm bench all --save PROFILE.json`"
Warn = Callable[[str], None]
Way = Literal["shared", "messages"]
"""How a channel carries its messages: queues in shared memory, or MPI messages."""


@dataclass(frozen=True)
class Cluster:
    """What the figures belong to."""

    cpu_model: str
    cores_per_node: int
    mpi_library: str
    mpi_version: str
    nodes: int
    ranks_per_node: int

    def differs_from(self, other: "Cluster") -> str:
        """In what another machine's figures would not hold here; "" where they do."""
        pairs = [
            ("processor", self.cpu_model, other.cpu_model),
            ("MPI library", self.mpi_name, other.mpi_name),
        ]
        return " and ".join(
            f"{what} {one!r}, not {two!r}" for what, one, two in pairs if one != two
        )

    @property
    def mpi_name(self) -> str:
        return f"{self.mpi_library} {self.mpi_version}"


@dataclass(frozen=True)
class Cost:
    """Seconds by bytes: the measured medians, ascending, and the line latency + bytes / rate through them."""

    points: tuple[tuple[int, float], ...]
    latency_seconds: float
    bytes_per_second: float | None
    """None where the time does not grow with the bytes."""
    relative_error: float
    """Of the line: the root of the mean square."""

    def seconds(self, nbytes: int) -> float:
        """Between points straight on logarithmic axes, outside of them by the line."""
        sizes = [size for size, _ in self.points]
        if not sizes or not sizes[0] <= nbytes <= sizes[-1]:
            return self.latency_seconds + (
                nbytes / self.bytes_per_second if self.bytes_per_second else 0.0
            )
        right = bisect_left(sizes, nbytes)
        (high, at_high) = self.points[right]
        if high == nbytes:
            return at_high
        (low, at_low) = self.points[right - 1]
        part = math.log(nbytes / low) / math.log(high / low) if low else nbytes / high
        return math.exp(math.log(at_low) + part * math.log(at_high / at_low))


@dataclass(frozen=True)
class CollectiveCost:
    """One algorithm of one operation on `ranks` ranks of `nodes` nodes; bytes are those of the whole array."""

    operation: str
    algorithm: str
    element: str
    device: str
    nodes: int
    ranks: int
    ranks_per_node: int
    node_shared: bool
    """Whether the arrays lay in memory that the node shares."""
    cost: Cost


@dataclass(frozen=True)
class PointToPointCost:
    """Messages between two ranks of one `level`: "node" or "network". The cost is half a round trip."""

    level: str
    cost: Cost
    bandwidth_bytes_per_second: float | None = None
    both_ways_bytes_per_second: float | None = None
    messages_per_second: float | None = None


@dataclass(frozen=True)
class ClusterProfile:
    """A whole profile. `memory`, `gemm`, `filesystem` and `gpu_probe` are as docs/bench.md tells them. `handover`: of a
    message within a node while its sender computes, by each way; profiles from before it have none.
    """

    made: str
    cluster: Cluster
    collectives: tuple[CollectiveCost, ...] = ()
    point_to_point: tuple[PointToPointCost, ...] = ()
    memory: Mapping[str, Any] = field(default_factory=dict)
    gemm: tuple[Mapping[str, Any], ...] = ()
    filesystem: Mapping[str, Any] = field(default_factory=dict)
    gpu_probe: Mapping[str, Any] = field(default_factory=dict)
    handover: Mapping[Way, Cost] = field(default_factory=dict)

    def predict(
        self,
        operation: str,
        algorithm: str,
        nbytes: int,
        element: str,
        nodes: int,
        ranks: int,
        device: str = "cpu",
        node_shared: bool = False,
    ) -> float | None:
        """Seconds of a collective of `nbytes`; None where nothing was measured for this combination.

        `node_shared`: where the arrays lie; what was measured in the other memory alone is taken for both.
        """
        wanted = (operation, algorithm, element, nodes, ranks, device)
        found = {
            entry.node_shared: entry.cost
            for entry in self.collectives
            if wanted
            == (
                entry.operation,
                entry.algorithm,
                entry.element,
                entry.nodes,
                entry.ranks,
                entry.device,
            )
        }
        cost = found.get(node_shared, found.get(not node_shared))
        return None if cost is None else cost.seconds(nbytes)

    def best(
        self,
        operation: str,
        nbytes: int,
        element: str,
        nodes: int,
        ranks: int,
        allowed: Iterable[str],
        device: str = "cpu",
        node_shared: bool = False,
    ) -> str | None:
        """The one of `allowed` algorithms that is fastest by `predict`; None where none was measured."""
        where = (nbytes, element, nodes, ranks, device, node_shared)
        known = {name: self.predict(operation, name, *where) for name in allowed}
        seconds = {name: value for name, value in known.items() if value is not None}
        return min(seconds, key=lambda name: seconds[name]) if seconds else None

    def faster_way(self, nbytes: int) -> Way | None:
        """The way within a node that hands `nbytes` over sooner; None where that was not measured."""
        if not self.handover:
            return None
        best: Way = min(self.handover, key=lambda way: self.handover[way].seconds(nbytes))
        return best

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "made": self.made,
            "cluster": asdict(self.cluster),
            "collectives": [_flat(entry) for entry in self.collectives],
            "point_to_point": [_flat(entry) for entry in self.point_to_point],
            "memory": dict(self.memory),
            "gemm": [dict(entry) for entry in self.gemm],
            "filesystem": dict(self.filesystem),
            "gpu_probe": dict(self.gpu_probe),
            "handover": {way: asdict(cost) for way, cost in self.handover.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError where a part is missing or wrong."""
        return cls(
            str(value["made"]),
            Cluster(**value["cluster"]),
            tuple(CollectiveCost(**_split(entry)) for entry in value["collectives"]),
            tuple(PointToPointCost(**_split(entry)) for entry in value["point_to_point"]),
            dict(value["memory"]),
            tuple(map(dict, value["gemm"])),
            dict(value["filesystem"]),
            dict(value["gpu_probe"]),
            {_way(name): _split(cost)["cost"] for name, cost in value.get("handover", {}).items()},
        )

    def save(self, path: Path) -> None:
        """Write the file whole or not at all. One rank calls it. Raises UsageError when it cannot be written."""
        try:
            write_json(path, self.to_json())
        except OSError as failure:
            raise UsageError(
                f"cannot write the profile {path}: {failure.strerror}; choose another place"
            ) from failure


def _flat(entry: CollectiveCost | PointToPointCost) -> dict[str, Any]:
    """The cost's keys beside the others."""
    value = asdict(entry)
    cost: dict[str, Any] = value.pop("cost")
    return value | cost


def _split(value: Mapping[str, Any]) -> dict[str, Any]:
    names = {part.name for part in fields(Cost)}
    points = tuple((int(size), float(seconds)) for size, seconds in value["points"])
    bandwidth = value["bytes_per_second"]
    if not all(0 < seconds < math.inf for _, seconds in points) or list(points) != sorted(points):
        raise ValueError("points must ascend and take longer than nothing")
    cost = Cost(
        points,
        float(value["latency_seconds"]),
        None if bandwidth is None else float(bandwidth),
        float(value["relative_error"]),
    )
    return {key: part for key, part in value.items() if key not in names} | {"cost": cost}


def _way(name: str) -> Way:
    if name not in get_args(Way):
        raise ValueError(f"no way is called {name!r}")
    return cast(Way, name)


def load_profile(path: Path, warn: Warn, here: Cluster) -> ClusterProfile | None:
    """The profile at `path`; None, after one sentence to `warn`, where it was made by another schema or for another
    cluster than `here` (see `describe_cluster`). Raises UsageError when it is missing or cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as failure:
        raise UsageError(f"there is no profile {path}; {WAY_OUT}") from failure
    except (OSError, ValueError) as failure:
        raise UsageError(f"the profile {path} cannot be read: {failure}; {WAY_OUT}") from failure
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise UsageError(f"{path} is no cluster profile (its schema is not {SCHEMA!r}); {WAY_OUT}")
    if value.get("version") != VERSION:
        warn(
            f"the profile {path} is of version {value.get('version')}, this mpillm reads {VERSION}: ignored; {WAY_OUT}"
        )
        return None
    try:
        profile = ClusterProfile.from_json(value)
    except (KeyError, TypeError, ValueError, AttributeError) as failure:
        raise UsageError(
            f"the profile {path} is damaged: {type(failure).__name__} {failure}; {WAY_OUT}"
        ) from failure
    if difference := profile.cluster.differs_from(here):
        warn(f"the profile {path} is of another cluster ({difference}): ignored; {WAY_OUT}")
        return None
    return profile


def describe_cluster(comm: "MPI.Intracomm") -> Cluster:
    """What this job runs on, as rank 0 sees it. Every rank of `comm` calls it."""
    from mpi4py import MPI

    nodes, ranks = hosts(comm), local_ranks(comm)
    name, version = MPI.get_vendor()
    cpu_model, cores = processor()
    here = Cluster(cpu_model, cores, name, ".".join(map(str, version)), nodes, ranks)
    return comm.bcast(here)  # type: ignore[no-any-return]
