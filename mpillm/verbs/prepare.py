"""`mpillm prepare`."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from mpillm.system.command_line import Debug, Option
from mpillm.tokens.prepare import PrepareOptions
from mpillm.verbs.job import open_job
from mpillm.weights.places import CHECKPOINTS, checkpoint_folders


def tokenizer_of(named: str) -> str:
    """Return the newest checkpoint of a run that is named as a tokenizer; any other as it is."""
    folders = list(checkpoint_folders(Path(named) / CHECKPOINTS).values())
    return str(folders[-1]) if folders else named


@dataclass(frozen=True)
class Prepare(PrepareOptions):
    """Turn text into tokens: HDF5 shards and a manifest, the same bytes for any number of ranks."""

    example: ClassVar = "mpirun -n 2 mpillm prepare stdlib --out prepared/stdlib --vocab-size 4096"
    prints_its_result: ClassVar = False

    verify: Annotated[Path | None, Option("Check every byte of a prepared folder instead.")] = None
    debug: Debug = False

    def run(self) -> None:
        if self.verify is None and (not self.sources or self.out is None):
            raise typer.BadParameter("name at least one SOURCE and --out DIR, or --verify DIR")
        if self.workers:
            os.environ["RAYON_NUM_THREADS"] = str(self.workers)
        with open_job(self.debug) as job:
            from mpillm.tokens.prepare import prepare, prepare_folds
            from mpillm.tokens.verify import verify

            if self.verify is not None:
                verify(self.verify, job.comm, job.console)
            else:
                options = replace(
                    self,
                    workers=self.workers or job.threads,
                    tokenizer=tokenizer_of(self.tokenizer),
                )
                make = prepare_folds if self.folds else prepare
                make(options, job.comm, job.console)
