"""What the reference of a run says of its answers: log-probabilities of the weights at the start.

They are computed once, before the first step, by the model that is trained: there is no copy of it.
The run's folder keeps them, for a resume and an evaluation.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.comm.failure import on_root
from mpillm.errors import CheckpointError, MismatchError
from mpillm.infer.evaluate import Scorer, collect_rows
from mpillm.infer.loading import open_of
from mpillm.runs.folder import REFERENCES
from mpillm.system.atomic import replacing
from mpillm.system.console import Console
from mpillm.system.messages import why
from mpillm.system.plain_files import LARGEST_FILE, read_plain
from mpillm.tasks.metrics.metric import Array, Arrays
from mpillm.tasks.preferences.preference import PreferenceTask
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.manifest import SPLITS, Manifest
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.samples import RowShape, SampleReader
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.places import CHECKPOINTS

if TYPE_CHECKING:
    from mpi4py import MPI


MISMATCHED = "mismatched"
"""Among the splits, the prompts of the training split with the answers of others."""


@dataclass(frozen=True)
class References:
    """The log-probabilities of answers, float64 (n, 2), by split."""

    of_split: Mapping[str, Array]

    def give(self, reader: SampleReader) -> None:
        """Set what the reader's rows are compared with."""
        assert isinstance(reader, PairReader)
        reader.references = self.of_split[reader.name]
        if reader.name == "train" and MISMATCHED in self.of_split:
            reader.mismatched.references = self.of_split[MISMATCHED]


def find_references(
    scorer: Scorer,
    manifest: Manifest,
    run: Path,
    begins: bool,
    comm: "MPI.Intracomm",
    console: Console,
) -> References:
    """Compute the references of a run that `begins`, and keep them; else read those kept.

    `scorer`: the model with the weights at the start. Every rank calls it. Raises CheckpointError
    where those of a resumed run are missing or damaged.
    """
    found: dict[str, Array] = {}
    splits = [name for name in SPLITS if manifest.splits[name].n_tokens]
    for name in [*splits, *([MISMATCHED] if scorer.task.needs_baseline else [])]:
        path, split = run / REFERENCES.format(name), "train" if name == MISMATCHED else name
        if not begins:
            found[name] = _read(path, manifest.splits[split].n_docs, comm)
            continue
        with open_of(manifest, split) as reader:
            assert isinstance(reader, PairReader)
            console.say(f"the reference of the {name} answers: the weights at the start")
            answers = reader.mismatched if name == MISMATCHED else reader
            found[name] = compute_references(scorer, answers, comm, console)
        on_root(comm, partial(_write, path, found[name]))
    return References(found)


def compute_references(
    scorer: Scorer, reader: PairReader, comm: "MPI.Intracomm", console: Console
) -> Array:
    """Compute the log-probability of each answer of a split, (n, 2); NaN where there is none.

    Every rank calls it, and gets all of them. No other reference may be set.
    """
    task = scorer.task
    assert isinstance(task, PreferenceTask)
    # Log-ratios to a reference of 0 are log-probabilities.
    reader.references = np.zeros((reader.n_pairs, 2))

    def answers(outputs: Any, _: Arrays) -> Array:
        values: Array = outputs[0] / task.beta
        return values

    own, _, _ = collect_rows(scorer, reader, comm, console, [answers])
    lengths = reader.row_lengths(RowShape.of(task, Lengths.of(scorer.spec)))
    # The rows of an evaluation are the pairs that fit into one, in order.
    members = np.flatnonzero(lengths.kept)
    found = np.full((reader.n_pairs, 2), np.nan)
    for numbers_B, values_B2 in (
        part
        for rank in comm.allgather([(each.numbers_B, each.statistics.table[:, 2:]) for each in own])
        for part in rank
    ):
        found[members[numbers_B]] = values_B2
    return found


def read_references(checkpoint: Checkpoint, manifest: Manifest, comm: "MPI.Intracomm") -> Array:
    """Read the references of the validation split for an evaluation. Every rank calls it.

    Raises MismatchError for other data than the run's, CheckpointError where they are missing.
    """
    if manifest.manifest_hash != checkpoint.facts["data"]:
        raise MismatchError(
            f"{checkpoint.folder} is compared with the answers of its reference, which are known "
            f"for the run's own data alone, and {manifest.folder} is another dataset; leave --data "
            "out"
        )
    folder = checkpoint.folder.absolute()
    run = folder.parents[1] if folder.parent.name == CHECKPOINTS else folder
    path = run / REFERENCES.format("validation")
    return _read(path, manifest.splits["validation"].n_docs, comm)


def _read(path: Path, count: int, comm: "MPI.Intracomm") -> Array:
    def read() -> Array:
        try:
            found: Array = np.load(io.BytesIO(read_plain(path, most=LARGEST_FILE)))
            if found.shape != (count, 2) or found.dtype != np.float64 or np.isinf(found).any():
                raise ValueError(f"it is no table of the data's {count:,} records")
        except (OSError, ValueError, EOFError) as failure:
            raise CheckpointError(
                f"{path} holds what the weights at the start say of the answers, and cannot be "
                f"read: {why(failure)}; copy it back, or train the run again from its start"
            ) from failure
        return found

    return on_root(comm, read)


def _write(path: Path, values: Array) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, values, allow_pickle=False)
