"""The reference point of KTO: how far the model is from its reference, on answers to other prompts.

Each record's prompt is joined with the answer of the record after it. The mean log-ratio of these
estimates the divergence KL(π ‖ π_ref); 0 where it is below (Ethayarajh et al. 2024, section 4.1).
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpillm.parallel.pipeline.stage import Batch
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.tasks.metrics.metric import Array, Arrays
from mpillm.tasks.preferences.preference import PreferenceTask
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.samples import RowShape

if TYPE_CHECKING:
    from mpi4py import MPI


class ReferencePoint:
    """The reference point of each step, computed by forward passes ahead of it.

    A step takes as many mismatched answers as its batch has rows: a pure function of (seed, step).
    """

    def __init__(
        self, model: ShardedModel, reader: PairReader, batch: int, seed: int, first_row: int
    ) -> None:
        """`first_row`: the first row of the batch that this rank takes."""
        task = model.task
        assert isinstance(task, PreferenceTask)
        self._model, self._task, self._first_row = model, task, first_row
        # Each in a row of its own.
        row = RowShape.of(task, Lengths.of(model.spec))
        self._samples = reader.mismatched.steps(row, batch, seed)

    def add(self, batch: Batch, step: int, comm: "MPI.Intracomm") -> Batch:
        """Return the batch with its reference point; `comm`: of the ranks that train together.

        Every rank calls it.
        """
        point = self.of(step, comm)
        fields = [
            {**each, "baseline": each["reference"].new_full((len(each["reference"]), 1), point)}
            if each
            else each
            for each in batch.fields
        ]
        return replace(batch, fields=fields)

    def of(self, step: int, comm: "MPI.Intracomm") -> float:
        """Compute max(0, the mean log-ratio of the step's mismatched answers)."""
        model, bounds = self._model, self._model.plan.bounds

        def read(number: int) -> Any:
            first, last = bounds[number]
            return self._task.fields(self._samples.raw(step, self._first_row + first, last - first))

        def shape_of(number: int) -> tuple[int, int]:
            first, last = bounds[number]
            return last - first, model.spec.context

        def ratios(outputs: Any, _: Arrays) -> Array:
            values: Array = outputs[0][:, :1] / self._task.beta
            return values

        scores = model.score(len(bounds), read, shape_of, _nothing, [ratios])
        # After the loss and the weight of a row.
        own = [float(value) for each in scores.values() for value in each.rows.table[:, 2]]
        every = [value for part in comm.allgather(own) for value in part]
        # Summed exactly: the order of ranks leaves no trace.
        # In this order NaN stays NaN, and the step is found to diverge.
        return max(math.fsum(every) / len(every), 0.0)


def _nothing() -> None:
    """Count no progress: these passes are a part of a step."""
