"""Train on each fold of a dataset, with each of several seeds, one run after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_root
from mpillm.errors import DataError, RecipeError
from mpillm.runs.folder import OUTCOME, RECIPE
from mpillm.runs.run_files import read_recipe
from mpillm.system.atomic import write_text
from mpillm.system.console import Console
from mpillm.system.json_text import to_json
from mpillm.system.plain_files import read_text
from mpillm.tokens.dataset_folder import FOLD
from mpillm.tokens.manifest import Manifest
from mpillm.train.folds.fold_summary import read_figures, summarise
from mpillm.train.recipe import Recipe

if TYPE_CHECKING:
    from mpi4py import MPI

SUMMARY = "folds.json"
SEED = "seed-{}"


@dataclass(frozen=True)
class FoldRun:
    """One of the runs: `fold` from 1, 0 without folds."""

    fold: int
    seed: int
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return Path(self.recipe.train.run)


def plan_runs(recipe: Recipe, folds: bool, seeds: int) -> list[FoldRun]:
    """Plan the runs of `recipe`: on each fold of its data, with `seeds` seeds from its own on.

    Their folders are in `train.run`: fold-1, or fold-1/seed-0 with several seeds. Raises
    RecipeError where the data has no folds, DataError where they do not belong together.
    """
    data, run = Path(recipe.data.path), Path(recipe.train.run)
    numbers = _folds_of(data) if folds else [0]
    planned = []
    for fold in numbers:
        name = FOLD.format(fold)
        place, source = (run / name, data / name) if fold else (run, data)
        for seed in range(recipe.train.seed, recipe.train.seed + seeds):
            own = place / SEED.format(seed) if seeds > 1 else place
            settings = replace(recipe.train, run=str(own), seed=seed)
            sources = replace(recipe.data, path=str(source))
            planned.append(FoldRun(fold, seed, replace(recipe, train=settings, data=sources)))
    return planned


def train_runs(
    runs: Sequence[FoldRun],
    train: Callable[[Recipe], None],
    run: Path,
    resume: bool,
    comm: "MPI.Intracomm",
    console: Console,
) -> None:
    """Train each of `runs` by `train`, then print and write what they say together.

    `run`: the folder around them, where the summary is written as folds.json. `resume`: runs that
    are finished are left out. Every rank calls it.
    """
    for number, each in enumerate(runs, 1):
        what = f"fold {each.fold}, seed {each.seed}" if each.fold else f"seed {each.seed}"
        if resume and on_root(comm, lambda each=each: is_finished(each)):  # type: ignore[misc]
            console.say(f"run {number} of {len(runs)}, {what}: {each.folder} is finished")
            continue
        console.say(f"run {number} of {len(runs)}, {what}: {each.folder}")
        train(each.recipe)

    def finish() -> None:
        figures = [read_figures(each.folder) for each in runs]
        summary = summarise([(each.fold, each.seed) for each in runs], figures)
        write_text(run / SUMMARY, to_json(summary.to_json(), indent=1) + "\n")
        summary.print(str(run), console)

    on_root(comm, finish)
    console.say(f"wrote {run / SUMMARY}")


def is_finished(planned: FoldRun) -> bool:
    """Return whether a run did all of the steps that are asked for now, or stopped early."""
    try:
        outcome = read_text(planned.folder / OUTCOME).strip()
    except (OSError, ValueError):
        return False
    recorded = read_recipe(planned.folder / RECIPE)[0].get("train", {})
    return outcome == "finished" and recorded.get("steps") == planned.recipe.train.steps


def _folds_of(data: Path) -> list[int]:
    """Return the numbers of the folds at `data`, which are those of one `prepare --folds`."""
    if not (data / FOLD.format(1)).is_dir():
        raise RecipeError(
            f"--folds trains on each fold of data.path = {str(data)!r}, and there is no "
            f"{FOLD.format(1)} in it; make the folds with `mpillm prepare SOURCE --folds 5 --out "
            f"{data}`"
        )
    first = Manifest.load(data / FOLD.format(1))
    numbers = first.prep.get("fold")
    count = numbers[1] if isinstance(numbers, list) and len(numbers) == 2 else 0
    for fold in range(1, count + 1):
        own = Manifest.load(data / FOLD.format(fold))
        same = {**first.prep, "fold": [fold, count]}
        if own.prep != same or own.tokenizer != first.tokenizer:
            raise DataError(
                f"{own.folder} is not fold {fold} of {count} of the documents of {first.folder}; "
                "prepare all folds again with one command"
            )
    if count < 2:
        raise DataError(
            f"{first.folder} was prepared by itself, and is no fold; prepare the folds with "
            "`mpillm prepare SOURCE --folds 5`"
        )
    return list(range(1, count + 1))
