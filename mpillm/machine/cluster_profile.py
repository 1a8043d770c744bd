"""The cluster profile: the figures of `mpillm bench --save`, a JSON file that comm chooses
algorithms by.

    {"schema": "mpillm cluster profile", "version": 1, "made": DATE, "cluster": {…},
     "collectives": [{…}, …], "point_to_point": [{…}, …], "memory": {…}, "gemm": [{…}, …],
     "filesystem": {…}, "gpu_probe": {…},
     "handover": {"shared": {…}, "messages": {…}}}

docs/bench.md explains every key. Sizes are bytes, times seconds, rates bytes a second.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast, get_args

from mpillm.errors import UsageError
from mpillm.machine.cpu import processor
from mpillm.machine.node_map import NodeMap, map_nodes
from mpillm.system.atomic import write_json
from mpillm.system.json_text import from_json
from mpillm.system.messages import explain
from mpillm.system.plain_files import read_text

if TYPE_CHECKING:
    from mpi4py import MPI

SCHEMA, VERSION = "mpillm cluster profile", 1
REMEDY = "make one with `mpirun … mpillm bench all --save PROFILE.json`"
Warn = Callable[[str], None]
Way = Literal["shared", "messages"]
"""How a message passes between two ranks: through shared memory or by MPI."""
ALIASES: Mapping[str, str] = MappingProxyType({"native": "mpi"})
"""Former names of algorithms, still read in profiles, recipes and options."""


@dataclass(frozen=True)
class Cluster:
    """The hardware and the MPI library that the figures belong to."""

    cpu_model: str
    cores_per_node: int
    mpi_library: str
    mpi_version: str
    nodes: int
    ranks_per_node: int

    def differs_from(self, other: "Cluster") -> str:
        """Say why figures of this cluster do not hold on `other`; "" where they do."""
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
    """Seconds by bytes: the measured medians, ascending, and the line latency + bytes / rate
    through them.
    """

    points: tuple[tuple[int, float], ...]
    latency_seconds: float
    bytes_per_second: float | None
    """None where the time does not grow with the bytes."""
    relative_error: float
    """Of the line: the root of the mean square."""

    def seconds(self, nbytes: int) -> float:
        """Interpolate the points on logarithmic axes; outside of them follow the line."""
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
        # A size of 0 has no logarithm: from there the interpolation is linear.
        part = math.log(nbytes / low) / math.log(high / low) if low else nbytes / high
        return math.exp(math.log(at_low) + part * math.log(at_high / at_low))


@dataclass(frozen=True)
class CollectiveCost:
    """One algorithm of one operation on `ranks` ranks of `nodes` nodes; bytes are those of the
    whole array.
    """

    operation: str
    algorithm: str
    element: str
    device: str
    nodes: int
    ranks: int
    ranks_per_node: int
    node_shared: bool
    """Whether the arrays were in memory that the node's ranks share."""
    cost: Cost


@dataclass(frozen=True)
class PointToPointCost:
    """Messages between two ranks of one `level`: "node" or "network". The cost is half a round
    trip.
    """

    level: str
    cost: Cost
    bandwidth_bytes_per_second: float | None = None
    both_ways_bytes_per_second: float | None = None
    messages_per_second: float | None = None


@dataclass(frozen=True)
class ClusterProfile:
    """A whole profile. docs/bench.md describes `memory`, `gemm`, `filesystem` and `gpu_probe`.

    `handover`: the cost of a message within a node while its sender computes, by each way; older
    profiles have none.
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
        """Predict the seconds of a collective of `nbytes`; None where this combination was not
        measured.

        `node_shared`: whether the arrays are in node-shared memory. A figure of one kind of memory
        alone is taken for both.
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
        allowed: Sequence[str],
        device: str = "cpu",
        node_shared: bool = False,
    ) -> str | None:
        """Return the `allowed` algorithm that is fastest by `predict`; None where none was
        measured.
        """
        where = (nbytes, element, nodes, ranks, device, node_shared)
        known = {name: self.predict(operation, name, *where) for name in allowed}
        seconds = {name: value for name, value in known.items() if value is not None}
        return min(seconds, key=lambda name: seconds[name]) if seconds else None

    def faster_way(self, nbytes: int) -> Way | None:
        """Return the way within a node that delivers `nbytes` sooner; None where it was not
        measured.
        """
        if not self.handover:
            return None
        best: Way = min(self.handover, key=lambda way: self.handover[way].seconds(nbytes))
        return best

    def to_json(self) -> dict[str, Any]:
        """Write the profile as the JSON object that `from_json` reads."""
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
        """Read what `to_json` wrote; raises KeyError, TypeError or ValueError for a missing or
        wrong part.
        """
        return cls(
            str(value["made"]),
            _typed(Cluster, value["cluster"]),
            tuple(_collective(entry) for entry in value["collectives"]),
            tuple(_typed(PointToPointCost, _split(entry)) for entry in value["point_to_point"]),
            dict(value["memory"]),
            tuple(map(dict, value["gemm"])),
            dict(value["filesystem"]),
            dict(value["gpu_probe"]),
            {_way(name): _split(cost)["cost"] for name, cost in value.get("handover", {}).items()},
        )

    def save(self, path: Path) -> None:
        """Write the file atomically. One rank calls it. Raises UsageError when it cannot be
        written.
        """
        try:
            write_json(path, self.to_json())
        except OSError as failure:
            raise UsageError(f"cannot write the profile {explain(failure, path)}") from failure


def _flat(entry: CollectiveCost | PointToPointCost) -> dict[str, Any]:
    """Put the cost's keys into the entry's own object."""
    value = asdict(entry)
    cost: dict[str, Any] = value.pop("cost")
    return value | cost


def _collective(value: Mapping[str, Any]) -> CollectiveCost:
    """Read one collective; an algorithm's former name becomes the present one."""
    entry = _typed(CollectiveCost, _split(value))
    return replace(entry, algorithm=ALIASES.get(entry.algorithm, entry.algorithm))


def _split(value: Mapping[str, Any]) -> dict[str, Any]:
    """Gather the keys of the cost into a Cost, and check it."""
    names = {part.name for part in fields(Cost)}
    points = tuple((int(size), float(seconds)) for size, seconds in value["points"])
    sizes = [size for size, _ in points]
    if not all(0 < seconds < math.inf for _, seconds in points) or sizes != sorted(sizes):
        raise ValueError("points must ascend in size and have positive times")
    if sizes and not 0 <= sizes[0] <= sizes[-1] < 1 << 63:
        raise ValueError("sizes of points are bytes, from 0 up")
    bandwidth = value["bytes_per_second"]
    cost = Cost(
        points,
        _finite(value["latency_seconds"], 0.0),
        None if bandwidth is None else _finite(bandwidth, math.nextafter(0, 1)),
        _finite(value["relative_error"], 0.0),
    )
    return {key: part for key, part in value.items() if key not in names} | {"cost": cost}


def _finite(value: Any, least: float) -> float:
    number = float(value)
    if not least <= number < math.inf:
        raise ValueError(f"{value} is no time and no rate")
    return number


Made = TypeVar("Made")


def _typed(kind: type[Made], value: Mapping[str, Any]) -> Made:
    """Make the dataclass `kind` of JSON's values, each of the type of its field."""
    made = kind(**value)
    for part in fields(kind):  # type: ignore[arg-type]
        own = getattr(made, part.name)
        # A whole number is a float too, and a rate may be None.
        fitting: Any = part.type if part.type in (str, int, bool) else float | int | None
        wrong = not isinstance(own, Cost) and not isinstance(own, fitting)
        if wrong or (isinstance(own, bool) and fitting is not bool):
            raise TypeError(f"{part.name} is {own!r:.60}")
        if isinstance(own, float) and not math.isfinite(own):
            raise ValueError(f"{part.name} is {own}")
    return made


def _way(name: str) -> Way:
    if name not in get_args(Way):
        raise ValueError(f"no way is called {name!r}")
    return cast(Way, name)


def load_profile(
    path: Path, warn: Warn, here: Cluster | None, aid: bool = False
) -> ClusterProfile | None:
    """Load the profile at `path`; None, and one sentence to `warn`, where it does not hold here.

    That is a profile of another version, or of another cluster than `here` (see
    `describe_cluster`; None: of any, as for a plan that is made elsewhere). Raises UsageError when
    the file is missing or cannot be read. `aid`: the profile only makes a run faster, so a damaged
    one is ignored too; a missing one is not.
    """
    try:
        return _read_profile(path, warn, here)
    except UsageError as failure:
        if not aid or not path.exists():
            raise
        fault, _, remedy = str(failure).rpartition("; ")
        warn(f"{fault}: ignored; {remedy}")
        return None


def _read_profile(path: Path, warn: Warn, here: Cluster | None) -> ClusterProfile | None:
    try:
        value = from_json(read_text(path))
    except FileNotFoundError as failure:
        raise UsageError(f"there is no profile {path}; {REMEDY}") from failure
    except OSError as failure:
        raise UsageError(
            f"the profile {path} cannot be read: {failure.strerror}; {REMEDY}"
        ) from failure
    except ValueError as failure:
        raise UsageError(f"the profile {path} cannot be read: {failure}; {REMEDY}") from failure
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise UsageError(
            f"{path} is not a cluster profile (its schema is not {SCHEMA!r}); {REMEDY}"
        )
    if value.get("version") != VERSION:
        warn(
            f"the profile {path} is of version {value.get('version')}, this mpillm reads "
            f"{VERSION}: ignored; {REMEDY}"
        )
        return None
    try:
        profile = ClusterProfile.from_json(value)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as failure:
        what = f"no {failure}" if isinstance(failure, KeyError) else str(failure)
        raise UsageError(f"the profile {path} is damaged: {what}; {REMEDY}") from failure
    if here and (difference := profile.cluster.differs_from(here)):
        warn(f"the profile {path} is of another cluster ({difference}): ignored; {REMEDY}")
        return None
    return profile


def describe_cluster(comm: "MPI.Intracomm", node_map: NodeMap | None = None) -> Cluster:
    """Describe the machine of this job as rank 0 sees it; `node_map`: of `comm`. Every rank of
    `comm` calls it.
    """
    from mpi4py import MPI

    node_map = node_map or map_nodes(comm)
    nodes, ranks = len(node_map.nodes), len(node_map.local_ranks(comm.rank))
    name, version = MPI.get_vendor()
    cpu_model, cores = processor()
    here = Cluster(cpu_model, cores, name, ".".join(map(str, version)), nodes, ranks)
    return comm.bcast(here)  # type: ignore[no-any-return]
