from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpillm.machine.memory import resident_bytes
from mpillm.machine.node_map import NodeMap
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import Precision, plan_step
from mpillm.plan.held_memory import Replicas
from mpillm.plan.peak_memory import MemoryEstimate
from mpillm.runs.history import attempts, read_history
from mpillm.runs.state import read_run
from mpillm.runs.status import facts, run_figures
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.run_memory import RunMemory, compare_text, peak_memory_bytes, shortage

MIB = 1 << 20


def recipe(**train: object) -> Recipe:
    found = parse_recipe({"data": {"path": "x"}, "train": train}, "test")
    return replace(found, model=found.model.replace(vocab_size=1000))


def planned(found: Recipe, device: str = "cpu", dtype: str = "float32"):
    plan = plan_step(
        found.model,
        ParallelSettings(),
        1,
        found.train.batch,
        found.train.microbatch,
        recompute=found.train.recompute,
    )
    return replace(plan, precision=Precision(device, dtype))


def test_the_remedies_are_those_that_need_less_with_what_they_need() -> None:
    found = recipe()
    memory = RunMemory(found, Replicas(), 100 * MIB)
    text = memory.remedy(planned(found, "cuda"))
    assert "a rank are predicted, train.microbatch = 1 for 32 (the batch stays as it is): " in text
    assert 'train.recompute = "full": ' in text
    assert "train.dtype = bfloat16: " in text
    assert text.endswith("or take a smaller model")
    small = recipe(microbatch=1, recompute="full")
    text = RunMemory(small, Replicas(), 100 * MIB).remedy(planned(small, "cpu"))
    assert "microbatch" not in text
    assert "recompute" not in text
    assert "dtype" not in text


def test_a_shortage_counts_the_ranks_of_a_host() -> None:
    estimate, two = MemoryEstimate(weights=3 * MIB), NodeMap(((0, 1), (2,)))
    assert shortage(estimate, two, 6 * MIB, lambda: "do this") == ""
    assert shortage(estimate, two, 0, lambda: "do this") == ""
    text = shortage(estimate, two, 5 * MIB, lambda: "do this")
    assert text == "2 rank(s) of a host may need 6.0 MiB, and it has 5.0 MiB: do this"


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
