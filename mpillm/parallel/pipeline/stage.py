"""What one stage of a pipeline computes: a part of the model on one microbatch after another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mpillm.models.decoder import Decoder, loss_sum
from mpillm.parallel.data.replicated import GradientBuckets
from mpillm.parallel.pipeline.split_backward import SplitBackward


class PipelineStage(Protocol):
    """What the interpreter runs. Streams and their gradients are contiguous tensors of the shape that was agreed.

    The first stage is given no stream and returns no gradient, the last returns no stream and is given no gradient.
    """

    def forward(self, microbatch: int, stream: Tensor | None) -> Tensor | None: ...
    def backward(self, microbatch: int, gradient: Tensor | None) -> Tensor | None: ...
    def backward_input(self, microbatch: int, gradient: Tensor | None) -> Tensor | None: ...
    def backward_weight(self, microbatch: int) -> None: ...


@dataclass(frozen=True)
class Batch:
    """A rank's share of the global batch, microbatch by microbatch."""

    ids: Sequence[Tensor]
    """(B, T + 1) each: inputs and, one further, targets. Empty where no stage of the rank needs them."""
    documents: Sequence[Tensor | None]
    """(B, T) each, or None."""
    scale: float
    """What each microbatch's summed loss is divided by."""


@dataclass(frozen=True)
class _Held:
    """What a forward pass leaves for the backward."""

    pivot: Tensor
    """What the backward pass must reach first: the stream that came in, or the embedding's output."""
    output: Tensor


class ModelStage:
    """A part of the model under training. `number`: which of the rank's stages, as `buckets` counts them.

    `losses` holds, on the last stage, the loss of each microbatch, over `Batch.scale`.
    """

    def __init__(
        self, part: Decoder, number: int, buckets: GradientBuckets, autocast: torch.dtype | None
    ) -> None:
        self.part, self.losses = part, dict[int, float]()
        self._number, self._buckets, self._autocast = number, buckets, autocast
        self._batch: Batch | None = None
        self._held: dict[int, _Held] = {}
        self._halves: dict[int, SplitBackward] = {}
        self._left = 0
        self._embedded: Tensor | None = None
        if part.embedding is not None:
            part.embedding.register_forward_hook(self._notice)

    def _notice(self, module: nn.Module, given: object, output: Tensor) -> None:
        self._embedded = output

    def begin(self, batch: Batch) -> None:
        """Take the batch of a step."""
        self._batch, self._left = batch, len(batch.documents)
        self.losses.clear()
        self._held.clear()
        self._halves.clear()

    def forward(self, microbatch: int, stream: Tensor | None) -> Tensor | None:
        batch, part = self._batch, self.part
        assert batch is not None
        given = stream.requires_grad_() if stream is not None else batch.ids[microbatch][:, :-1]
        with torch.autocast("cpu", dtype=self._autocast, enabled=self._autocast is not None):
            output = part(given, batch.documents[microbatch])
        if part.ends:
            output = loss_sum(output, batch.ids[microbatch][:, 1:]) / batch.scale
            self.losses[microbatch] = float(output.detach())
        pivot = stream if stream is not None else self._embedded
        assert pivot is not None
        self._held[microbatch], self._embedded = _Held(pivot, output), None
        return None if part.ends else output.detach()

    def backward(self, microbatch: int, gradient: Tensor | None) -> Tensor | None:
        held = self._held.pop(microbatch)
        self._before_weights()
        torch.autograd.backward(held.output, gradient)
        self._after_weights()
        return None if self.part.begins else held.pivot.grad

    def backward_input(self, microbatch: int, gradient: Tensor | None) -> Tensor | None:
        held = self._held.pop(microbatch)
        self._halves[microbatch] = halves = SplitBackward(held.output, held.pivot)
        found = halves.input(gradient)
        return None if self.part.begins else found

    def backward_weight(self, microbatch: int) -> None:
        self._before_weights()
        self._halves.pop(microbatch).weights()
        self._after_weights()

    def _before_weights(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._buckets.begin_last_microbatch(self._number)

    def _after_weights(self) -> None:
        if self._buckets.fixed_order:
            self._buckets.fold(self._number)


class ScoringStage:
    """A part of the model that scores: forward passes alone. `losses`: the summed loss by microbatch.

    `read(microbatch)`: its ids (B, T + 1). `done` is called after each that the model's beginning has gone through.
    """

    def __init__(
        self,
        part: Decoder,
        read: Callable[[int], Tensor],
        autocast: torch.dtype | None,
        done: Callable[[], None],
    ) -> None:
        self.part, self.losses = part, dict[int, float]()
        self._read, self._autocast, self._done = read, autocast, done

    def forward(self, microbatch: int, stream: Tensor | None) -> Tensor | None:
        part = self.part
        ids = self._read(microbatch) if part.begins or part.ends else None
        with (
            torch.inference_mode(),
            torch.autocast("cpu", dtype=self._autocast, enabled=self._autocast is not None),
        ):
            given = stream if stream is not None or ids is None else ids[:, :-1]
            output: Tensor = part(given)
        if part.begins:
            self._done()
        if not part.ends or ids is None:
            return output
        with torch.inference_mode():
            self.losses[microbatch] = float(loss_sum(output, ids[:, 1:]))
        return None

    def backward(self, microbatch: int, gradient: Tensor | None) -> Tensor | None:
        raise AssertionError("a scoring stage has no backward pass")

    backward_input = backward

    def backward_weight(self, microbatch: int) -> None:
        self.backward(microbatch, None)
