"""Runs of islands: data parallel, then rounds; saved, resumed, and read by other layouts."""

import signal
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.errors import LayoutError, MpillmError, RecipeError, StoppedError
from mpillm.launch.signals import StopSignals
from mpillm.system.console import Console
from mpillm.train.loop import JobLimits
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train
from tests.train.run_results import hashes, numbers

QUIET = Console(speaks=False)
EVERY = 2


def recipe(dataset: Path, run: Path, islands: int, /, **sections: dict[str, object]) -> Recipe:
    table: dict[str, dict[str, object]] = {
        "model": {"layers": 2, "width": 16, "heads": 2, "context": 24},
        "data": {"path": str(dataset)},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "train": {"run": str(run), "sinks": [], "steps": 4, "batch": 12 if islands % 3 == 0 else 8},
        "parallel": {"island": islands, "island_every": EVERY},
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section}
    return parse_recipe(table, "test")


def islands_of(comm: MPI.Intracomm) -> int:
    """Two islands, of two ranks each where there are four; three at three ranks."""
    if comm.size == 1:
        pytest.skip("needs several ranks")
    return 3 if comm.size == 3 else 2


def test_before_the_first_round_islands_are_one_data_axis(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    islands = islands_of(comm)
    fixed = {"fixed_order": True, "microbatch": 1, "evaluate_every": 2}
    late = {"island_from": 4}
    train(recipe(data, folder / "a", islands, train=fixed, parallel=late), comm, QUIET)
    batch = {"batch": 12 if islands == 3 else 8}
    train(recipe(data, folder / "b", 1, train={**fixed, **batch}), comm, QUIET)
    assert numbers(folder / "a") == numbers(folder / "b")
    assert hashes(folder / "a", comm) == hashes(folder / "b", comm)


def test_a_round_begins_with_the_whole_batch_and_parts_from_then_on(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    islands = islands_of(comm)
    batch = {"batch": 12 if islands == 3 else 8}
    train(recipe(data, folder / "plain", 1, train=batch), comm, QUIET)
    train(recipe(data, folder / "alone", islands, parallel={"island_from": 2}), comm, QUIET)
    plain, alone = numbers(folder / "plain"), numbers(folder / "alone")
    # Steps 1 and 2 are data parallel. Step 3 has the same weights, so the mean of the islands'
    # losses is that of the batch: each island computes its own part of it.
    for step in range(3):
        assert alone[step][0] == pytest.approx(plain[step][0], rel=2e-6)
    assert alone[1][1] == pytest.approx(plain[1][1], rel=1e-5)
    assert alone[3][0] != pytest.approx(plain[3][0], rel=2e-6)
    names = hashes(folder / "alone", comm)
    own = [name for name in names if name.startswith("optimizer/island-")]
    assert {name.split("/")[1] for name in own} == {f"island-{n}" for n in range(1, islands)}
    plain_names = hashes(folder / "plain", comm)
    outer = {
        name.replace("model/", "optimizer/outer_momentum/")
        for name in plain_names
        if name.startswith("model/")
    }
    assert set(names) - set(own) == set(plain_names) | outer


class Asked(StopSignals):
    """A signal that reached one rank before the run began."""

    def __init__(self, here: bool) -> None:
        self.number, self._orderly = signal.SIGUSR1 * here, False


@pytest.mark.parametrize("pipeline", [1, pytest.param(2, marks=pytest.mark.ranks(4))])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    data: Path, folder: Path, comm: MPI.Intracomm, pipeline: int
) -> None:
    islands = islands_of(comm)
    sections = {
        "train": {"evaluate_every": 2, "save_every": 2},
        "parallel": {"island_momentum": 0.5, "island_rate": 0.7, "pipeline": pipeline},
    }
    train(recipe(data, folder / "whole", islands, **sections), comm, QUIET)
    cut = recipe(data, folder / "cut", islands, **sections)
    # Within the first round, and at its end.
    for number in (1, 2):
        asked = JobLimits(Asked(comm.rank == comm.size - 1))
        with pytest.raises(StoppedError, match=f"step-0000000{number}"):
            train(cut, comm, QUIET, resume=number > 1, limits=asked)
        names = hashes(folder / "cut", comm)
        within = [name for name in names if name.startswith("optimizer/island-0/weight/")]
        assert bool(within) == (number % EVERY > 0)
        assert any(name.startswith("optimizer/outer_momentum/") for name in names)
    train(cut, comm, QUIET, resume=True)
    assert numbers(folder / "cut") == numbers(folder / "whole")
    assert hashes(folder / "cut", comm) == hashes(folder / "whole", comm)


def test_another_layout_reads_the_common_weights(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    islands = islands_of(comm)
    begin = recipe(data, folder / "run", islands, parallel={"island_dtype": "bfloat16"})
    train(begin, comm, QUIET)
    before = hashes(folder / "run", comm)
    batch = {"batch": 12 if islands == 3 else 8, "steps": 5}
    train(recipe(data, folder / "run", 1, train=batch), comm, QUIET, resume=True)
    after = hashes(folder / "run", comm)
    assert set(after) == {name for name in before if "island-" not in name and "outer" not in name}
    # And back again: islands begin with the state that is there.
    again = recipe(data, folder / "run", islands, train={**batch, "steps": 6})
    train(again, comm, QUIET, resume=True)
    assert len(numbers(folder / "run")) >= 6


@pytest.mark.ranks(1, 2, 4)  # a batch of 8
def test_one_island_is_plain_training(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    settings = {"island_rate": 0.3, "island_momentum": 0.9, "island_from": 1, "island_every": 7}
    train(recipe(data, folder / "one", 1, parallel=settings), comm, QUIET)
    train(recipe(data, folder / "plain", 1), comm, QUIET)
    assert numbers(folder / "one") == numbers(folder / "plain")
    assert hashes(folder / "one", comm) == hashes(folder / "plain", comm)


@pytest.mark.parametrize(
    ("sections", "kind", "words"),
    [
        ({"train": {"evaluate_every": 3}}, RecipeError, "multiple of parallel.island_every = 2"),
        ({"train": {"noise_scale": 3}}, LayoutError, "train alone; leave one of them out"),
        ({"train": {"batch": 7}}, LayoutError, "a global batch of 7 sequences cannot be shared"),
        ({"parallel": {"island": 5}}, LayoutError, "must divide the ranks"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run_has_a_folder(
    data: Path,
    folder: Path,
    comm: MPI.Intracomm,
    sections: dict[str, dict[str, object]],
    kind: type[MpillmError],
    words: str,
) -> None:
    with pytest.raises(kind, match=words):
        train(recipe(data, folder / "run", islands_of(comm), **sections), comm, QUIET)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "wrong", [{"island_rate": 0.0}, {"island_momentum": 1.0}, {"island_dtype": "float16"}]
)
def test_settings_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"parallel\.island_"):
        recipe(tmp_path, tmp_path, 2, parallel=wrong)


@pytest.mark.ranks(4)  # two islands of two ranks
def test_islands_of_shards_train_as_islands_of_whole_weights(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    save = {"save_every": 2, "fixed_order": True, "microbatch": 1}
    for zero in (0, 3):
        run = folder / f"run{zero}"
        half = recipe(data, run, 2, train={**save, "steps": 2}, parallel={"zero": zero})
        train(half, comm, QUIET)
        train(recipe(data, run, 2, train=save, parallel={"zero": zero}), comm, QUIET, resume=True)
    assert numbers(folder / "run3") == numbers(folder / "run0")
