"""The cluster profile: there and back, what it predicts, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.errors import UsageError
from mpillm.machine.cluster_profile import (
    Cluster,
    ClusterProfile,
    CollectiveCost,
    Cost,
    PointToPointCost,
    describe_cluster,
    load_profile,
    processor,
)

HERE = Cluster("Made Up 9000", 64, "Open MPI", "5.0.9", 2, 4)
COST = Cost(((1000, 1e-5), (100_000, 1e-3)), 2e-6, 1e9, 0.1)


def profile() -> ClusterProfile:
    def entry(algorithm: str, cost: Cost, element: str = "float32") -> CollectiveCost:
        return CollectiveCost("allreduce", algorithm, element, "cpu", 2, 8, 4, False, cost)

    slow_start = replace(COST, points=((1000, 5e-5), (100_000, 5e-4)))
    return ClusterProfile(
        "2026-11-25",
        HERE,
        (entry("ring", slow_start), entry("mpi", COST), entry("ring", COST, "bfloat16")),
        (PointToPointCost("node", COST, 1e10, 2e10, 1e6),),
        {"copy_bytes_per_second": 1e10},
        ({"edge": 64},),
        handover={"shared": COST, "messages": replace(COST, latency_seconds=1.0)},
    )


def ask(algorithm: str, nbytes: int, **other: Any) -> float | None:
    wanted = {"element": "float32", "nodes": 2, "ranks": 8} | other
    return profile().predict("allreduce", algorithm, nbytes, **wanted)


def test_there_and_back(tmp_path: Path) -> None:
    path, heard = tmp_path / "profile.json", list[str]()
    profile().save(path)
    assert load_profile(path, heard.append, HERE) == profile()
    assert heard == []
    value = json.loads(path.read_text())
    assert (value["schema"], value["version"]) == ("mpillm cluster profile", 1)
    assert set(value["collectives"][0]) == {
        "operation",
        "algorithm",
        "element",
        "device",
        "nodes",
        "ranks",
        "ranks_per_node",
        "node_shared",
        "points",
        "latency_seconds",
        "bytes_per_second",
        "relative_error",
    }


def test_prediction_goes_through_the_points_and_along_the_line_outside() -> None:
    assert ask("mpi", 1000) == 1e-5
    assert ask("mpi", 100_000) == 1e-3
    assert ask("mpi", 10_000) == pytest.approx(1e-4)
    assert ask("mpi", 0) == 2e-6
    assert ask("mpi", 10**9) == pytest.approx(1 + 2e-6)
    flat = replace(COST, points=(), bytes_per_second=None)
    assert flat.seconds(10**9) == 2e-6
    assert replace(COST, points=((0, 1e-6), (100, 1e-4))).seconds(50) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    "other", [{"element": "int8"}, {"nodes": 1}, {"ranks": 9}, {"device": "cuda"}]
)
def test_nothing_is_made_up(other: dict[str, Any]) -> None:
    assert ask("mpi", 1000, **other) is None


def test_where_the_arrays_lie_counts() -> None:
    private, shared = (
        replace(profile().collectives[1], node_shared=shared) for shared in (False, True)
    )
    fast = replace(COST, points=((1000, 1e-6),))
    both = replace(profile(), collectives=(private, replace(shared, cost=fast)))
    asked = ("allreduce", "mpi", 1000, "float32", 2, 8, "cpu")
    assert both.predict(*asked) == 1e-5
    assert both.predict(*asked, node_shared=True) == 1e-6
    assert profile().predict(*asked, node_shared=True) == 1e-5


def test_the_best_of_those_allowed() -> None:
    best = profile().best
    assert best("allreduce", 1000, "float32", 2, 8, ("ring", "mpi", "shared")) == "mpi"
    assert best("allreduce", 100_000, "float32", 2, 8, ("ring", "mpi")) == "ring"
    assert best("allreduce", 1000, "float32", 2, 8, ("shared",)) is None
    assert best("broadcast", 1000, "float32", 2, 8, ("ring", "mpi")) is None


def test_the_faster_way_of_a_hand_over() -> None:
    assert profile().faster_way(10**9) == "shared"
    assert replace(profile(), handover={}).faster_way(10**9) is None


def test_a_profile_from_before_the_hand_over_was_measured(tmp_path: Path) -> None:
    value = profile().to_json()
    del value["handover"]
    (tmp_path / "p").write_text(json.dumps(value))
    assert load_profile(tmp_path / "p", print, HERE) == replace(profile(), handover={})


@pytest.mark.parametrize("handover", [None, 1, {"shared": None}, {"shared": {}}, {"pigeon": {}}])
def test_a_damaged_hand_over(tmp_path: Path, handover: object) -> None:
    with pytest.raises(UsageError, match="damaged"):
        load_profile(write(tmp_path / "p", handover=handover), print, HERE)


def write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(profile().to_json() | changes))
    return path


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_version_is_a_warning(tmp_path: Path, version: object) -> None:
    heard: list[str] = []
    assert load_profile(write(tmp_path / "p", version=version), heard.append, HERE) is None
    assert len(heard) == 1
    assert f"version {version}" in heard[0]
    assert "mpillm bench all --save" in heard[0]


@pytest.mark.parametrize(
    ("here", "words"),
    [
        (replace(HERE, cpu_model="Other 1"), "processor 'Made Up 9000', not 'Other 1'"),
        (replace(HERE, mpi_version="5.1.0"), "MPI library 'Open MPI 5.0.9', not 'Open MPI 5.1.0'"),
    ],
)
def test_another_cluster_is_a_warning(tmp_path: Path, here: Cluster, words: str) -> None:
    heard: list[str] = []
    assert load_profile(write(tmp_path / "p"), heard.append, here) is None
    assert len(heard) == 1
    assert words in heard[0]


def test_another_number_of_ranks_is_the_same_cluster(tmp_path: Path) -> None:
    heard: list[str] = []
    assert load_profile(
        write(tmp_path / "p"), heard.append, replace(HERE, nodes=7, ranks_per_node=1)
    )
    assert heard == []


DAMAGED = [
    "",
    "[]",
    "{",
    "{}",
    '{"schema": "another"}',
    "\0",
    json.dumps({"schema": "mpillm cluster profile", "version": 1}),
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_file_that_is_no_profile(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"p\.json.*mpillm bench all --save"):
        load_profile(path, print, HERE)


@pytest.mark.parametrize(
    "points",
    [None, "x", [1], [[1, 0]], [[1, -1.0]], [[2, 1.0], [1, 1.0]], [[1, float("nan")]], [[1, 2, 3]]],
)
def test_damaged_points(tmp_path: Path, points: object) -> None:
    value = profile().to_json()
    value["collectives"][0]["points"] = points
    with pytest.raises(UsageError, match="damaged"):
        load_profile(write(tmp_path / "p", **value), print, HERE)


def test_files_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no profile"):
        load_profile(tmp_path / "nothing", print, HERE)
    with pytest.raises(UsageError, match="cannot be read"):
        load_profile(tmp_path, print, HERE)
    with pytest.raises(UsageError, match="cannot write"):
        profile().save(tmp_path / "no" / "folder.json")


def test_this_cluster(comm: MPI.Intracomm) -> None:
    here = describe_cluster(comm)
    assert comm.allgather(here) == [here] * comm.size
    assert here.nodes * here.ranks_per_node >= comm.size
    assert here.cpu_model
    assert here.cores_per_node >= 1


def test_the_processor(tmp_path: Path) -> None:
    table = tmp_path / "cpuinfo"
    table.write_text("processor\t: 0\nmodel name\t: Fast 1\nprocessor\t: 1\nmodel name\t: Fast 1\n")
    assert processor(table) == ("Fast 1", 2)
    name, cores = processor(tmp_path / "none")
    assert name
    assert cores == 1


def damaged(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """Replace one part of the JSON value."""
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return value


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the place of every part of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, part in inner:
        found.append((*above, key))
        if isinstance(part, dict | list):
            found += places(part, (*above, key))
    return found


@pytest.mark.parametrize(
    "new", [None, "x", -1, 1e308, float("nan"), float("inf"), 10**400, [], {}, [[]], True, [[1, 2]]]
)
def test_any_part_of_any_kind_is_read_or_refused(tmp_path: Path, new: Any) -> None:
    path, text = tmp_path / "profile.json", json.dumps(profile().to_json())
    refused = 0
    for place in places(json.loads(text)):
        path.write_text(json.dumps(damaged(json.loads(text), place, new)))
        heard = list[str]()
        try:
            found = load_profile(path, heard.append, HERE)
        except UsageError:
            refused += 1
            # Where it is only an aid the same is a warning.
            assert load_profile(path, heard.append, HERE, aid=True) is None
            assert "ignored" in heard[-1]
            assert str(path) in heard[-1]
            continue
        if found is not None:
            for cost in found.collectives:
                assert cost.cost.seconds(5000) >= 0
    assert refused > 10


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe{", "is not UTF-16"),
        (b"\x00\xff", "is not UTF-8"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"null", "is not a cluster profile"),
    ],
)
def test_what_is_no_profile(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        load_profile(tmp_path / "p.json", print, HERE)
    with pytest.raises(UsageError, match="there is no profile"):
        load_profile(tmp_path / "none.json", print, HERE, aid=True)


def test_a_mark_of_an_editor_is_taken_off(tmp_path: Path) -> None:
    text = json.dumps(profile().to_json())
    (tmp_path / "p.json").write_text(text, encoding="utf-8-sig")
    assert load_profile(tmp_path / "p.json", print, HERE) == profile()
