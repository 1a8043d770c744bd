"""Stages of a pipeline: a part of the model that computes one microbatch after another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mpillm.models.linear_head import plain_outputs
from mpillm.models.part_module import Fields, PartModule, Streams
from mpillm.parallel.data.gradient_sync import GradientSync
from mpillm.parallel.pipeline.split_backward import SplitBackward
from mpillm.parallel.step_plan import Precision
from mpillm.parallel.teacher import Teacher
from mpillm.tasks.metrics.metric import Array, Arrays, RowStatistics
from mpillm.tasks.task import Task, outputs_read


class PipelineStage(Protocol):
    """A stage as the executor calls it.

    Streams and their gradients are contiguous tensors of the agreed shapes. The first stage gets no
    streams and returns no gradients; the last returns no streams and gets no gradients.
    """

    def forward(self, microbatch: int, streams: Streams) -> Streams: ...
    def backward(self, microbatch: int, gradients: Streams) -> Streams: ...
    def backward_input(self, microbatch: int, gradients: Streams) -> Streams: ...
    def backward_weight(self, microbatch: int) -> None: ...


@dataclass(frozen=True)
class Batch:
    """A rank's share of the global batch, microbatch by microbatch."""

    fields: Sequence[Fields]
    """The task's fields of each microbatch; an empty mapping where no stage of the rank reads any.
    """
    scale: float
    """The weight of the global batch, by which each microbatch's summed loss is divided."""
    sequences: int = 1
    """Of the global batch, by which what a part adds to the loss is divided."""


@dataclass(frozen=True)
class _Held:
    """The tensors of a forward pass that its backward pass needs."""

    received: Streams
    """The pivots whose gradients go back; the others are embeddings of this stage."""
    pivots: Streams
    outputs: Streams
    """The streams for the next part, or the loss; then the scalar that the part adds, if any."""

    def completed(self, gradients: Streams) -> tuple[Streams, tuple[Tensor | None, ...]]:
        """Return the outputs that have a gradient, and it: None for a scalar, which none is
        received of.

        Frozen weights that begin the model give outputs without one.
        """
        given = *gradients, *(None,) * (len(self.outputs) - len(gradients))
        pairs = [pair for pair in zip(self.outputs, given, strict=True) if pair[0].requires_grad]
        return tuple(output for output, _ in pairs), tuple(gradient for _, gradient in pairs)


class ModelStage:
    """A part of the model under training.

    `number`: the part's number on this rank, as `sync` counts them. `losses`: on the last stage,
    the loss of each microbatch over `Batch.scale`.
    """

    def __init__(self, part: PartModule, number: int, sync: GradientSync, task: Task) -> None:
        self.part, self.losses = part, dict[int, Tensor]()
        self._number, self._sync, self._task = number, sync, task
        self.teacher: Teacher | None = None
        """Of a distillation, on the last stage; the losses are then (1 + k,): with their parts."""
        self.batch: Batch | None = None
        """The batch of the step, set before its first pass."""
        self.loss_scale = 1.0
        """The factor of all gradients of the step, set before its first pass."""
        self._held: dict[int, _Held] = {}
        self._split: dict[int, SplitBackward] = {}
        # Backward passes of this step: before the last one, `sync` may start to reduce.
        self._backward_passes = 0

    def forward(self, microbatch: int, streams: Streams) -> Streams:
        batch, part = self.batch, self.part
        assert batch is not None
        fields = batch.fields[microbatch]
        # Received tensors are leaves of this stage's graph; their gradients go back.
        for stream in streams:
            stream.requires_grad_()
        made, pivots, balance = part.forward_part(fields, streams)
        outputs = outputs_read(self._task, made)
        if part.ends:
            loss = self._loss(microbatch, outputs, fields) / batch.scale
            outputs = (loss if self.loss_scale == 1.0 else loss * self.loss_scale,)
        added = () if balance is None else (balance * (self.loss_scale / batch.sequences),)
        self._held[microbatch] = _Held(streams, pivots, outputs + added)
        # Detached: the next stage starts a graph of its own.
        return () if part.ends else tuple(output.detach() for output in outputs)

    def _loss(self, microbatch: int, outputs: tuple[Any, ...], fields: Fields) -> Tensor:
        """Return the summed loss of a microbatch; note it over the scale of the batch."""
        assert self.batch is not None
        if self.teacher is None:
            loss = self._task.objective_sum(outputs, fields)
            self.losses[microbatch] = loss.detach() / self.batch.scale
            return loss
        loss, parts = self.teacher.objective_sum(self._task, self.part, outputs, fields)
        noted = torch.cat([loss.detach().view(1), parts.to(loss.dtype)])
        self.losses[microbatch] = noted / self.batch.scale
        return loss

    def backward(self, microbatch: int, gradients: Streams) -> Streams:
        held = self._held.pop(microbatch)
        self._before_weights()
        outputs, given = held.completed(gradients)
        if outputs:
            torch.autograd.backward(outputs, given)
        self._after_weights()
        return _gradients(held.received)

    def backward_input(self, microbatch: int, gradients: Streams) -> Streams:
        held = self._held.pop(microbatch)
        outputs, given = held.completed(gradients)
        pivots = tuple(pivot for pivot in held.pivots if pivot.requires_grad)
        self._split[microbatch] = split = SplitBackward(outputs, pivots)
        found = split.input(given)
        if self._sync.gathered is not None:
            # The block that is held then may be the first of a forward pass.
            self._sync.gathered.pass_ended()
        # The received streams are the first pivots.
        return found[: len(held.received)]

    def backward_weight(self, microbatch: int) -> None:
        self._before_weights()
        split, gathered = self._split.pop(microbatch), self._sync.gathered
        if gathered is None:
            split.weights()
        else:
            split.weights(gathered.before_gradients)
        self._after_weights()

    def _before_weights(self) -> None:
        assert self.batch is not None
        self._backward_passes += 1
        if self._backward_passes == len(self.batch.fields):
            self._backward_passes = 0
            self._sync.last_microbatch(self._number)

    def _after_weights(self) -> None:
        self._sync.microbatch_ended(self._number)


def _gradients(streams: Streams) -> Streams:
    # A stream that the part does not use has no gradient: zeros, as the split pass gives.
    return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in streams)


@dataclass(frozen=True)
class BatchScore:
    """The result of scoring one batch, on the rank that ends the model."""

    rows: RowStatistics
    """Of each row its loss, its weight, and the statistics of each metric that needs more than
    these, in the order that the caller asked for.
    """
    widths: tuple[int, ...]
    """The statistics of each of these metrics."""


OfRows = Callable[[Sequence[Array], Arrays], Array]


class ScoringStage:
    """A part of the model that scores: forward passes alone.

    `read(microbatch)` gives the fields of a batch. `done` is called after each batch that the first
    part has computed. `own(microbatch, fields)` is called ahead of each, and gives the fields as
    this rank reads them; None: as they are. `scores`: the result by microbatch, on the last stage.
    """

    def __init__(
        self,
        part: PartModule,
        task: Task,
        precision: Precision,
        read: Callable[[int], Fields],
        done: Callable[[], None],
        metrics: Sequence[OfRows] = (),
        own: Callable[[int, Fields], Fields] | None = None,
    ) -> None:
        self.part, self.scores = part, dict[int, BatchScore]()
        self._own = own
        self._task, self._precision, self._read, self._done = task, precision, read, done
        self._metrics = metrics
        # A document mask is of training alone, so only what every batch has is shared.
        shared = set(part.spec.shared_inputs).intersection(task.field_names)
        self._reads_fields = part.begins or part.ends or bool(shared)

    def forward(self, microbatch: int, streams: Streams) -> Streams:
        part = self.part
        fields: Fields = self._read(microbatch) if self._reads_fields else {}
        if self._own is not None:
            fields = self._own(microbatch, fields)
        stay, device = part.spec.host_inputs, self._precision.device
        read = {name: x if name in stay else x.to(device) for name, x in fields.items()}
        with torch.inference_mode():
            made = part.forward_part(read, streams).outputs
            # Where metrics read logits, these are computed once, for the loss too.
            plain = self._metrics and self._task.metrics_read_logits
            outputs = plain_outputs(made) if plain else outputs_read(self._task, made)
        if part.begins:
            self._done()
        if not part.ends:
            return outputs
        with torch.inference_mode():
            losses_B = self._task.row_losses(outputs, read).double().cpu().numpy()
            measured = self._task.metric_outputs(outputs, read) if self._metrics else ()
        self.scores[microbatch] = self._score(losses_B, measured, fields)
        return ()

    def _score(
        self, losses_B: Array, outputs: tuple[Tensor, ...], fields: Mapping[str, Tensor]
    ) -> BatchScore:
        weights_B = np.array(self._task.row_weights(fields, len(losses_B)), np.float64)
        tables: list[Array] = []
        if self._metrics:
            # NumPy has no bfloat16.
            wide = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in outputs]
            arrays = [output.cpu().numpy() for output in wide]
            given = {name: field.cpu().numpy() for name, field in fields.items()}
            tables = [of_rows(arrays, given) for of_rows in self._metrics]
        rows = RowStatistics.joined([losses_B[:, None], weights_B[:, None], *tables])
        return BatchScore(rows, tuple(table.shape[1] for table in tables))

    def backward(self, microbatch: int, gradients: Streams) -> Streams:
        raise AssertionError("a scoring stage has no backward pass")

    backward_input = backward

    def backward_weight(self, microbatch: int) -> None:
        self.backward(microbatch, ())
