"""Rows of a prepared dataset for calibration and for figures, shared by ranks batch by batch.

Shapes: B rows, T tokens.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_all
from mpillm.infer.decoding.token_rows import TokenRows
from mpillm.infer.evaluate import WholeModel
from mpillm.infer.loading import open_of
from mpillm.models.part_module import Fields, PartModule
from mpillm.models.spec import ModelSpec
from mpillm.system.console import Console
from mpillm.tasks.task import Task
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.samples import RowShape

if TYPE_CHECKING:
    from mpi4py import MPI

# Rows of a longer context say no more of a layer's inputs, and cost its square.
MOST_POSITIONS = 512
BATCH_TOKENS = 2048
# Of a text that the model continues, to time it.
PROMPT, WRITTEN = 16, 24


def read_rows(
    manifest: Manifest,
    split: str,
    task: Task,
    spec: ModelSpec,
    rows: int,
    comm: "MPI.Intracomm",
) -> list[Fields]:
    """Read about `rows` rows of a split, spread evenly; return this rank's batches of them.

    The batches are the same at any number of ranks. Every rank calls it.
    """
    # A decoder reads windows of any length.
    short = spec.any_length or (spec.generates and not spec.source_field)
    context = min(spec.context, MOST_POSITIONS) if short else spec.context
    lengths = Lengths(context, spec.source_context, spec.any_length)
    at_once = max(1, min(rows, BATCH_TOKENS // context))

    def read() -> list[Fields]:
        with open_of(manifest, split) as reader:
            samples = reader.evaluation(RowShape.of(task, lengths), at_once)
            numbers = spread(len(samples.shapes), -(-rows // at_once))
            return [task.fields(samples.raw(n)) for n in numbers[comm.rank :: comm.size]]

    return on_all(comm, read)


def spread(count: int, wanted: int) -> list[int]:
    """Return `wanted` numbers below `count`, evenly spread; all where there are no more."""
    wanted = min(count, wanted)
    return [number * count // wanted for number in range(wanted)]


@dataclass(frozen=True)
class ModelFigures:
    """What a table compares before and after."""

    nbytes: int
    """Of the tensors of the checkpoint."""
    loss: float | None
    """The mean negative log-likelihood of a token, in nats; None without data."""
    tokens: int
    """Those that count in the loss."""
    read_rate: float | None
    """Tokens per second of the forward passes of this loss, of all ranks."""
    write_rate: float | None
    """Tokens per second of one text that the model continues; None: it writes none."""


def measure_model(
    model: PartModule,
    task: Task,
    batches: Sequence[Fields],
    nbytes: int,
    comm: "MPI.Intracomm",
    console: Console,
) -> ModelFigures:
    """Score this rank's batches and time a continuation. Every rank calls it."""
    if not any(comm.allgather(len(batches))):
        return ModelFigures(nbytes, None, 0, None, None)
    scorer = WholeModel(model, task, comm)
    begun = time.perf_counter()
    with console.progress("evaluate", len(batches), "batches") as progress:
        scores = on_all(
            comm,
            lambda: scorer.score(
                len(batches), batches.__getitem__, lambda _: (0, 0), progress.advance
            ),
        )
    seconds = time.perf_counter() - begun
    own = [each.rows.table[:, :2] for each in scores.values()]
    every = [rows for part in comm.allgather(own) for rows in part]
    seconds = max(comm.allgather(seconds))
    loss = math.fsum(float(value) for rows in every for value in rows[:, 0])
    weight = math.fsum(float(value) for rows in every for value in rows[:, 1])
    rate = comm.bcast(_write_rate(model, batches) if comm.rank == 0 else None)
    mean = loss / weight if weight else None
    return ModelFigures(nbytes, mean, int(weight), weight / seconds if weight else None, rate)


def _write_rate(model: PartModule, batches: Sequence[Fields]) -> float | None:
    """Time the tokens that follow the first row's, on one rank; the prompt is not timed."""
    ids = batches[0].get("ids") if batches else None
    spec = model.spec
    if ids is None or not spec.generates or spec.source_field or spec.context < PROMPT + WRITTEN:
        return None
    rows = TokenRows(model, [ids[0, :PROMPT].tolist()])
    begun = 0.0
    # The first single token orders the codes for its kernel.
    for number in range(WRITTEN + 1):
        rows.push(rows.logits().argmax(-1))
        if number == 0:
            rows.logits()
            begun = time.perf_counter()
    return WRITTEN / (time.perf_counter() - begun)
