"""A dry run says what the run does: the same layout, the same refusals; it leaves nothing."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.errors import DataError, LayoutError, MpillmError, UsageError
from mpillm.machine.node_map import NodeMap, map_nodes
from mpillm.system.console import Console
from mpillm.train.dry_run import Hosts, planned_precision, print_dry_run, ranks_needed
from mpillm.train.recipe import Recipe, TrainSettings, parse_recipe
from mpillm.train.setup import train

QUIET = Console(speaks=False)


def recipe(data: Path, run: Path, **sections: Any) -> Recipe:
    table: dict[str, Any] = {
        "model": {"layers": 4, "width": 32, "heads": 2, "context": 32},
        "data": {"path": str(data)},
        "train": {"run": str(run), "steps": 1, "batch": 8},
    }
    for name, keys in sections.items():
        table[name] = {**table.get(name, {}), **keys}
    return parse_recipe(table, "dry run")


def printed(made: Recipe, hosts: Hosts, as_json: bool = False) -> str:
    stream = io.StringIO()
    print_dry_run(made, hosts, Console(stream=stream), as_json)
    return stream.getvalue()


def test_the_table_has_every_rank_and_every_kind(data: Path, tmp_path: Path) -> None:
    made = recipe(data, tmp_path / "run", parallel={"pipeline": 2})
    text = printed(made, Hosts.numbered(2, 2))
    for part in ("host 0", "host 1", "rank", "weights", "optimizer", "1f1b", "microbatch"):
        assert part in text
    table = json.loads(printed(made, Hosts.numbered(2, 2), as_json=True))
    assert table["mesh"].keys() == {"data", "pipeline"}
    order = list(table["mesh"])
    assert [[rank[axis] for axis in order] for rank in table["ranks"]] == [
        [0, 0],
        [0, 1],
        [1, 0],
        [1, 1],
    ]
    assert {tuple(map(tuple, rank["layers"])) for rank in table["ranks"]} == {((0, 2),), ((2, 4),)}
    for rank in table["ranks"]:
        assert sum(rank["bytes"].values()) == rank["total_bytes"]
    assert [host["host"] for host in table["hosts"]] == ["host 0", "host 1"]
    assert table["step"]["schedule"] == "1f1b"
    assert table["messages"]["data"]["rank_bytes"] > 0
    assert not (tmp_path / "run").exists()


def test_many_ranks_take_a_line_a_host(data: Path, tmp_path: Path) -> None:
    made = recipe(data, tmp_path / "run", train={"batch": 4096})
    text = printed(made, Hosts.numbered(32, 4))
    assert len(re.findall(r"host \d+ ", text)) == 16
    assert "…" in text
    with pytest.raises(UsageError, match="1,000,000"):
        Hosts.numbered(1_000_000, 2)


@pytest.mark.parametrize(
    ("sections", "always"),
    [
        ({"parallel": {"pipeline": 3}}, False),
        ({"train": {"batch": 7}}, False),
        ({"train": {"microbatch": 3}, "parallel": {"pipeline": 2}}, True),
        ({"train": {"fixed_order": True}}, True),
        ({"train": {"recompute": 9}}, True),
        ({"model": {"vocab_size": 5}}, True),
        ({"parallel": {"pipeline": 2, "stages": [1, 1]}}, True),
    ],
)
def test_what_cannot_be_is_refused_in_the_words_of_the_run(
    data: Path, folder: Path, comm: MPI.Intracomm, sections: dict[str, Any], always: bool
) -> None:
    made = recipe(data, folder / "run", **sections)
    hosts = Hosts.of_job([f"h{rank}" for rank in range(comm.size)], map_nodes(comm))
    of_run = refusal(lambda: train(made, comm, QUIET))
    assert of_run == refusal(lambda: print_dry_run(made, hosts, QUIET, False))
    assert of_run or not always


def refusal(work: Callable[[], None]) -> str:
    try:
        work()
    except MpillmError as failure:
        return f"{type(failure).__name__}: {failure}"
    return ""


def test_the_layout_is_that_of_the_run(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    pipeline = 2 if comm.size % 2 == 0 else 1
    made = recipe(data, folder / "run", parallel={"pipeline": pipeline}, train={"batch": 12})
    stream = io.StringIO()
    train(made, comm, Console(speaks=comm.rank == 0, stream=stream))
    hosts = Hosts.of_job([f"h{rank}" for rank in range(comm.size)], map_nodes(comm))
    dry = facts(printed(made, hosts))
    # The run says more of its ranks: their threads.
    assert comm.rank or facts(stream.getvalue()) == dry
    assert len(dry) == 2 + 2 * (pipeline > 1)


def facts(text: str) -> list[str]:
    """Return the lines of the plan that both print, up to the number of ranks."""
    lines = text.partition("\nranks")[0].splitlines()
    shown = tuple(f"  {name} " for name in ("mesh", "pipeline", "layers by rank", "optimizer"))
    return [line.split(" rank")[0].rstrip() for line in lines if line.startswith(shown)]


def test_a_recipe_that_names_its_vocabulary_needs_no_dataset(tmp_path: Path) -> None:
    made = recipe(tmp_path / "none", tmp_path / "run", model={"vocab_size": 300})
    assert "none is not here" in printed(made, Hosts.numbered(1, 1))
    with pytest.raises(DataError, match="not a prepared dataset"):
        printed(recipe(tmp_path / "none", tmp_path / "run"), Hosts.numbered(1, 1))


def test_hosts_of_a_job_are_named_in_the_order_of_the_mesh() -> None:
    hosts = Hosts.of_job(["a", "b", "a", "b"], NodeMap(((0, 2), (1, 3))))
    assert hosts.names == ("a", "b")
    assert hosts.node_map.nodes == ((0, 1), (2, 3))


def test_what_only_the_run_finds_out_is_noted() -> None:
    precision, notes = planned_precision(TrainSettings(device="cpu"))
    assert (precision.device, precision.dtype, notes) == ("cpu", "float32", [])
    precision, notes = planned_precision(TrainSettings(device="cuda"))
    assert (precision.device, precision.dtype) == ("cuda", "bfloat16")
    assert len(notes) == 1
    assert "auto" in planned_precision(TrainSettings())[1][0]


def test_without_nodes_the_axes_say_how_many_ranks(tmp_path: Path) -> None:
    made = recipe(tmp_path, tmp_path, parallel={"pipeline": 2, "data": 3})
    assert ranks_needed(made.parallel) == 6
    assert ranks_needed(recipe(tmp_path, tmp_path).parallel) == 1


def test_gpus_are_not_compared_with_the_memory_of_hosts(tmp_path: Path) -> None:
    for device, found in (("cpu", (1 << 20, False)), ("cuda", (None, None))):
        made = recipe(
            tmp_path / "none",
            tmp_path,
            model={"vocab_size": 300},
            train={"device": device},
            optimizer={"warmup_steps": 0},
        )
        table = json.loads(printed(made, Hosts.numbered(1, 1, 1 << 20), as_json=True))
        assert (table["host_memory_bytes"], table["fits"]) == found


def test_a_machine_that_nobody_named_is_named(tmp_path: Path) -> None:
    made = recipe(tmp_path / "none", tmp_path, model={"vocab_size": 300})
    hosts = Hosts.numbered(1, 1, 1 << 20, "--nodes N plans for others")
    assert printed(made, hosts).rstrip().endswith("; --nodes N plans for others")
    with pytest.raises(LayoutError, match=r"1 host is 64\.0 KiB.*; --nodes N plans for others$"):
        printed(made, replace(hosts, memory=(1 << 16,)))
    hosts = Hosts.of_job(["a", "b", "a"], NodeMap(((0, 2), (1,))), [3, 2, 3])
    assert hosts.memory == (3, 2)


@pytest.mark.parametrize(("dtype", "element_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_the_reference_of_written_answers_is_counted(
    tmp_path: Path, dtype: str, element_bytes: int
) -> None:
    def total(name: str, kl: float) -> tuple[int, int]:
        task: dict[str, Any] = {"name": name}
        if name == "grpo":
            task |= {"rewards": ["number"], "kl": kl}
        sections = {"model": {"vocab_size": 300}, "task": task}
        train_settings = {"device": "cpu", "dtype": dtype, "start_from": "runs/chat"}
        made = recipe(tmp_path / "none", tmp_path / "run", train=train_settings, **sections)
        table = json.loads(printed(made, Hosts.numbered(1, 1), as_json=True))
        return table["ranks"][0]["total_bytes"], table["model"]["parameters"]

    compared, parameters = total("grpo", 0.04)
    assert compared - total("grpo", 0.0)[0] == parameters * element_bytes
    assert total("grpo", 0.0)[0] == total("chat", 0.0)[0]
