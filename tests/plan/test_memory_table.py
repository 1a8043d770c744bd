"""The table of a refusal, what exceeds a host, and what no layout can hold."""

from dataclasses import replace

import pytest

from mpillm.machine.node_map import NodeMap
from mpillm.models.decoder import SHAPES
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import mesh_order, plan_step
from mpillm.plan.memory_table import MemoryTable, beyond_all_hosts
from mpillm.plan.rank_loads import load_ranks
from mpillm.system.console import binary_bytes
from mpillm.train.optimizers.adamw import AdamWSettings

SMALL = SHAPES["small"].replace(vocab_size=2048)
GIB = 1 << 30


def table(node_map: NodeMap, device: str = "cpu") -> MemoryTable:
    settings = ParallelSettings()
    sizes = mesh_order(settings, node_map.size, SMALL, 12)
    plan = plan_step(SMALL, settings, sizes["data"], 12)
    plan = replace(plan, precision=replace(plan.precision, device=device))
    loads = load_ranks(SMALL, plan, AdamWSettings(), sizes, node_map, settings)
    return MemoryTable.of(loads, device)


def test_the_fullest_host_is_compared() -> None:
    found = table(NodeMap(((0,), (1, 2))))
    assert found.fullest == 1
    most = found.nodes[1].total
    assert found.excess([most] * 2) == ""
    assert found.excess([0, 0]) == ""
    assert found.excess([most - 1] * 2).startswith("2 ranks of a host may need ")
    # GPUs have memory of their own.
    assert table(NodeMap(((0,), (1, 2))), "cuda").excess([1, 1]) == ""


def test_each_host_is_compared_with_its_own_memory() -> None:
    found = table(NodeMap(((0,), (1, 2))))
    less, most = (node.total for node in found.nodes)
    assert found.shortest([less, most]) is None
    # The first host holds less, and has even less.
    assert found.shortest([less - 2, most - 1]) == 0
    assert found.shortest([less - 1, most - 2]) == 1
    assert found.shortest([0, most - 1]) == 1
    text = found.excess([less - 2, most - 1])
    assert text.startswith(f"1 rank of a host may need {binary_bytes(less)}, and it has ")


def test_the_table_adds_up_and_names_what_it_shows() -> None:
    found = table(NodeMap(((0, 1),)))
    assert found.columns == ["kind", "rank 0", "its host"]
    assert table(NodeMap(((0,), (1,)))).columns[2] == "largest host"
    assert table(NodeMap(((0, 1),)), "cuda").columns[2] == "its host (GPUs)"
    assert [row[0] for row in found.rows][::7] == ["parameters", "total"]
    lines = found.text().splitlines()
    assert lines[0] == "peak memory"
    assert all(line == line.rstrip() for line in lines)
    assert [line.split()[0] for line in lines[3:]] == [row[0] for row in found.rows]


@pytest.mark.parametrize(
    ("settings", "batch", "words"),
    [
        ({"layers": 1 << 60}, 8, "whose weights alone need"),
        ({"vocab_size": 10**12}, 8, "vocabulary 1,000,000,000,000"),
        ({}, 10**12, "of ids alone"),
        ({}, 8, ""),
    ],
)
def test_what_no_layout_holds_is_found_without_a_plan(
    settings: dict[str, int], batch: int, words: str
) -> None:
    model = SMALL.replace(**settings)
    found = beyond_all_hosts(model, batch, [64 * GIB] * 2)
    assert words in found
    assert bool(found) == bool(words)
    assert not found or "and the memory of 2 hosts is 128.0 GiB; " in found
    assert beyond_all_hosts(model, batch, [0, 0]) == ""
    assert beyond_all_hosts(model, batch, [64 * GIB, 0]) == ""
    # Ids are in the memory of the hosts, whatever computes.
    on_gpus = beyond_all_hosts(model, batch, [64 * GIB] * 2, hosts_compute=False)
    assert on_gpus == (found if batch > 8 else "")


def test_two_hosts_hold_what_one_cannot() -> None:
    weights = 4 * SMALL.parameters
    assert beyond_all_hosts(SMALL, 8, [weights - 1])
    assert beyond_all_hosts(SMALL, 8, [weights - 1, 1]) == ""
