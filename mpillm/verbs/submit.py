"""`mpillm submit`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from mpillm.runs.submit import SubmitOptions, SubmittedRecipe, submit_run
from mpillm.system.command_line import Debug, Option
from mpillm.verbs.job import first_process
from mpillm.verbs.train import Overrides, Recipe


@dataclass(frozen=True, kw_only=True)
class Submit(SubmitOptions):
    """Write a batch script into the run's folder, show it, and submit it to Slurm, PBS or LSF; no
    MPI, no torch.
    """

    example: ClassVar = (
        "mpillm submit recipe.toml --nodes 2 --ranks-per-node 64 --time 12:00:00 --dry-run"
    )
    prints_its_result: ClassVar = False

    recipe: Recipe
    overrides: Overrides = ()
    site: Annotated[
        Path | None, Option("Instead of ~/.config/mpillm/site.toml.", metavar="SITE.toml")
    ] = None
    debug: Debug = False

    def run(self) -> None:
        with first_process(self.debug) as console:
            from mpillm.launch.site import load_site
            from mpillm.parallel.axis_sizes import mesh_sizes
            from mpillm.train.recipe import load_recipe, write_recipe

            notes: list[str] = []
            recipe = load_recipe(self.recipe, self.overrides, notes.append)
            if self.as_json:
                # One JSON object is all that --json prints.
                notes.clear()
            submitted = SubmittedRecipe(
                self.recipe.stem,
                recipe.train.run,
                recipe.data.path,
                recipe.parallel.profile,
                write_recipe(recipe),
            )

            mesh_sizes(recipe.parallel, self.ranks, recipe.model, recipe.train.batch)
            site = load_site(self.site, os.environ)
            for note in notes if not self.dry_run else ():
                console.say(note)
            submit_run(self, submitted, site, console, os.environ)
            # A script may be kept as a file: its first line stays the first.
            for note in notes if self.dry_run else ():
                console.say(f"# {note}")
