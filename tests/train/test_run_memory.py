import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpillm.errors import LayoutError
from mpillm.machine.memory import resident_bytes
from mpillm.machine.node_map import NodeMap
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import Precision, plan_step
from mpillm.runs.history import attempts, read_history
from mpillm.runs.state import read_run
from mpillm.runs.status import facts, run_figures
from mpillm.system.console import Console, binary_bytes
from mpillm.train.dry_run import Hosts, print_dry_run
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.run_memory import RunMemory, compare_text, peak_memory_bytes
from tests.namespaces import namespace

MIB = 1 << 20
# The mesh of one rank, and its node.
ALONE = {"data": 1}, NodeMap(((0,),))


def recipe(**train: object) -> Recipe:
    found = parse_recipe({"data": {"path": "x"}, "train": train}, "test")
    return replace(found, model=found.model.replace(vocab_size=1000))


def planned(found: Recipe, data: int = 1, device: str = "cpu", dtype: str = "float32"):
    plan = plan_step(
        found.model,
        ParallelSettings(),
        data,
        found.train.batch,
        found.train.microbatch,
        recompute=found.train.recompute,
    )
    return replace(plan, precision=Precision(device, dtype))


def test_the_remedies_are_those_that_need_less_with_what_they_need() -> None:
    found = recipe()
    memory = RunMemory(found, *ALONE, 100 * MIB)
    text = memory.remedy(planned(found, device="cuda"))
    assert "a rank are predicted, train.microbatch = 1 for 32 (the batch stays as it is): " in text
    assert 'train.recompute = "full": ' in text
    assert "train.dtype = bfloat16: " in text
    assert text.endswith("or take a smaller model")
    small = recipe(microbatch=1, recompute="full")
    text = RunMemory(small, *ALONE, 100 * MIB).remedy(planned(small))
    assert "microbatch" not in text
    assert "recompute" not in text
    assert "dtype" not in text


def test_the_check_has_the_table_of_the_dry_run(tmp_path: Path) -> None:
    """Where a process takes what the dry run assumes of it."""
    found = parse_recipe(
        {"data": {"path": f"{tmp_path}"}, "model": {"vocab_size": 1000}, "train": {"batch": 8}},
        "test",
    )
    stream, hosts = io.StringIO(), Hosts.numbered(1, 2, memory=MIB)
    with pytest.raises(LayoutError, match="use a smaller model"):
        print_dry_run(found, hosts, Console(stream=stream), as_json=False)
    hosts = replace(hosts, memory=(400 * MIB,))
    print_dry_run(found, hosts, Console(stream=stream), as_json=False)
    sizes = {"data": 2, "pipeline": 1}
    memory = RunMemory(found, sizes, hosts.node_map)
    plan = replace(planned(found, 2), precision=Precision())
    with pytest.raises(LayoutError, match=r"2 ranks of a host may need ") as caught:
        memory.check_hosts(plan, [400 * MIB])
    table = memory.table(plan).text()
    assert table in str(caught.value)
    dry = [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]
    assert "\n".join(dry).count(table) == 1
    assert "the run is refused without --force" in stream.getvalue()
    assert memory.check_hosts(plan, [400 * MIB], force=True).endswith("--force trains all the same")
    assert memory.check_hosts(plan, [0]) == ""
    assert memory.check_hosts(plan, [1 << 40]) == ""


def test_a_host_is_told_what_its_ranks_need_together() -> None:
    """The host has all but activations twice, and once with zero = 3."""
    found = parse_recipe({"data": {"path": "x"}, "model": {"width": 2048, "heads": 16}}, "test")
    found = replace(found, model=found.model.replace(vocab_size=1000))
    node_map = NodeMap(((0, 1),))
    memory, plan = RunMemory(found, {"data": 2, "pipeline": 1}, node_map), planned(found, 2)
    sharded = replace(found, parallel=replace(found.parallel, zero=3))
    less = RunMemory(sharded, memory.sizes, node_map)
    need = less.table(plan).nodes[0].total
    assert need < 0.8 * memory.table(plan).nodes[0].total
    with pytest.raises(LayoutError) as caught:
        memory.check_hosts(plan, [need])
    remedy = str(caught.value).splitlines()[-1]
    assert f"parallel.zero = 3: {binary_bytes(need)} on the host" in remedy
    assert 'train.recompute = "full": ' in remedy
    assert "a rank" not in remedy
    assert "zero" not in less.host_remedy(plan, 0)
    assert "zero" not in RunMemory(found, *ALONE).host_remedy(plan, 0)


LITTLE = """sed 's/^MemTotal:.*/MemTotal: 131072 kB/' /proc/meminfo > {file}
mount --bind {file} /proc/meminfo"""


def test_the_command_refuses_and_force_trains(data: Path, tmp_path: Path, mpillm: Any) -> None:
    """On a host of 128 MiB, which a mount over /proc/meminfo makes of this one."""
    before = namespace(LITTLE.format(file=tmp_path / "meminfo").replace("\n", " && "))
    run, recipe_path = tmp_path / "run", tmp_path / "recipe.toml"
    recipe_path.write_text(
        f'[data]\npath = "{data}"\n[model]\nlayers = 1\nwidth = 16\nheads = 2\ncontext = 16\n'
        f'[train]\nrun = "{run}"\nsteps = 1\nbatch = 4\n[optimizer]\nwarmup_steps = 0\n'
    )
    refused = mpillm("train", recipe_path, before=before)
    assert refused.returncode == LayoutError.exit_code
    assert "and it has 128.0 MiB:\npeak memory\n" in refused.stderr
    assert not run.exists()
    done = mpillm("train", recipe_path, "--force", before=before)
    assert done.returncode == 0, done.stderr
    assert "--force trains all the same" in done.stdout
    dry = json.loads(mpillm("train", recipe_path, "--dry-run", "--json", before=before).stdout)
    assert (dry["host_memory_bytes"], dry["fits"]) == (128 * MIB, False)
    assert "refused without --force" in dry["notes"][-1]
    named = ("--dry-run", "--nodes", "1", "--json")
    dry = json.loads(mpillm("train", recipe_path, *named, before=before).stdout)
    assert (dry["host_memory_bytes"], dry["fits"], dry["notes"][1:]) == (None, None, [])


def test_the_line_of_the_end_has_the_ratio() -> None:
    text = compare_text(110 * MIB, 100 * MIB)
    assert text.endswith("110.0 MiB predicted, 100.0 MiB measured (ratio 1.10)")


def test_the_resident_set_is_below_its_peak() -> None:
    assert 10 * MIB < resident_bytes() <= peak_memory_bytes() + MIB
    assert resident_bytes(Path("/nowhere")) == 0


def test_the_peak_is_not_that_of_the_process_before(python: Callable[..., Any]) -> None:
    """This one has 300 MiB at least while it starts the other, which has less."""
    held = bytearray(300 * MIB)
    held[::4096] = b"x" * len(held[::4096])
    code = "from mpillm.machine.memory import peak_resident_bytes; print(peak_resident_bytes())"
    done = python("-c", code)
    assert 10 * MIB < int(done.stdout) < 200 * MIB
    assert peak_memory_bytes() > 300 * MIB


def test_a_run_predicts_its_peak_and_records_both(
    data: Path, tmp_path: Path, python: Callable[..., Any]
) -> None:
    """In a process of its own: that of the suite has had larger peaks."""
    run, recipe_path = tmp_path / "run", tmp_path / "recipe.toml"
    recipe_path.write_text(
        f'[data]\npath = "{data}"\n[model]\nlayers = 4\nwidth = 256\nheads = 4\ncontext = 128\n'
        f'[train]\nrun = "{run}"\nsteps = 2\nbatch = 8\n[optimizer]\nwarmup_steps = 1\n'
    )
    done = python("-m", "mpillm", "train", recipe_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "memory a rank" in done.stdout
    (attempt,) = attempts(read_history(run / "history.jsonl"))
    predicted, measured = attempt.predicted_memory_bytes, attempt.memory_bytes
    assert predicted is not None
    assert measured is not None
    assert compare_text(predicted, measured) in done.stdout
    assert 0.8 < predicted / measured < 1.25
    found = run_figures(read_run(run))["memory"]
    assert found == {"predicted_bytes": predicted, "measured_bytes": measured}
    assert "predicted" in facts(run_figures(read_run(run)))["memory a rank"]


@pytest.mark.slow("two processes a layout, of a model that they do not hide")
@pytest.mark.parametrize("layout", ["zero=3", "tensor=2", "pipeline=2"])
def test_the_peak_of_a_layout_is_within_a_tenth(
    data: Path, tmp_path: Path, mpillm: Any, layout: str
) -> None:
    """Of the largest rank, with what the processes took ahead of their models.

    benchmarks/memory.py compares eight layouts without that, and hosts.
    """
    run, recipe_path = tmp_path / "run", tmp_path / "recipe.toml"
    recipe_path.write_text(
        f'[data]\npath = "{data}"\n[model]\nlayers = 6\nwidth = 512\nheads = 8\ncontext = 128\n'
        f'[train]\nrun = "{run}"\nsteps = 2\nbatch = 8\n[optimizer]\nwarmup_steps = 1\n'
    )
    done = mpillm("train", recipe_path, "--set", f"parallel.{layout}", ranks=2)
    assert done.returncode == 0, done.stderr
    (attempt,) = attempts(read_history(run / "history.jsonl"))
    assert attempt.predicted_memory_bytes is not None
    assert attempt.memory_bytes is not None
    assert 0.9 < attempt.predicted_memory_bytes / attempt.memory_bytes < 1.1
