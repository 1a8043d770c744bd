"""One step of training: read, compute, reduce, update."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpillm.comm.group import silent
from mpillm.comm.mesh import Axis
from mpillm.comm.profile import ClusterProfile
from mpillm.errors import DivergedError
from mpillm.models.decoder import Decoder, create, loss_sum
from mpillm.parallel.data import GradientBuckets, share_batch
from mpillm.tokens.reader import TokenReader
from mpillm.tokens.sampler import Sampler
from mpillm.tokens.windows import Windows
from mpillm.train.optimizer import learning_rate, make_optimizer, set_rate
from mpillm.train.overview import rows_at_once
from mpillm.train.recipe import Recipe


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over the global batch, nats a token, from the weights before the update."""

    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float


class Trainer:
    """Model, optimizer, gradients and samples of one rank; `step` runs them. Every rank of the axis steps alike."""

    def __init__(
        self, recipe: Recipe, reader: TokenReader, axis: Axis, profile: ClusterProfile | None = None,
        warn: Callable[[str], None] = silent,
    ) -> None:  # fmt: skip
        """`profile`: the cluster's, which chooses how gradients meet; `warn` is told what had to be done without."""
        self.recipe, self.axis = recipe, axis
        self._first, self._rows = share_batch(recipe.train.batch, axis)
        self.model: Decoder = create(recipe.model, recipe.train.seed)
        self.optimizer = make_optimizer(self.model, recipe.optimizer)
        self._buckets = GradientBuckets(self.model.parameters(), axis, recipe.parallel, profile, warn)
        self._sampler = Sampler(
            reader, recipe.model.context, recipe.train.batch, recipe.train.seed, boundaries=recipe.data.document_mask
        )

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.recipe.train.dtype == "bfloat16" else None

    def describe(self) -> str:
        """How gradients meet: `2 buckets by shared, after the backward pass`."""
        buckets = len(self._buckets.buckets)
        when = "behind" if self._buckets.behind else "after"
        by = " and ".join(self._buckets.algorithms)
        return f"{buckets} bucket{'s' * (buckets != 1)} by {by}, {when} the backward pass"

    def close(self) -> None:
        """Give shared memory back. Every rank of the axis calls it, after the last step."""
        self._buckets.close()

    def step(self, step: int) -> StepResult:
        """Step number `step`, counted from 0. Raises DivergedError on all ranks when a number is no longer finite."""
        begun = time.perf_counter()
        local_loss = self._gradients(step)
        losses = np.empty(self.axis.size)
        self.axis.comm.Allgather(np.array([local_loss]), losses)
        norm = self._buckets.clip_(self.recipe.optimizer.clip or math.inf)
        _check_finite(step, losses, norm)
        rate = learning_rate(self.recipe.optimizer, step, self.recipe.train.steps)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        return StepResult(math.fsum(losses), rate, norm, time.perf_counter() - begun)

    def _gradients(self, step: int) -> float:
        """Leave the gradients of the global batch in the buckets; return this rank's part of its mean loss."""
        windows = self._sampler.windows(step, self._first, self._rows)
        ids_BT = torch.from_numpy(windows.tokens_BT.astype(np.int64))
        documents_BT = document_numbers(windows) if self.recipe.data.document_mask else None
        # Each microbatch adds its share of the mean over the global batch, so microbatches need not be equal.
        global_tokens = self.recipe.train.batch * self.recipe.model.context
        self._buckets.zero()
        total = 0.0
        at_once = rows_at_once(self.recipe, self.axis.size)
        for first in range(0, self._rows, at_once):
            rows = slice(first, first + at_once)
            loss = self._loss(ids_BT[rows], documents_BT[rows] if documents_BT is not None else None) / global_tokens
            if first + at_once >= self._rows:
                self._buckets.begin_last_microbatch()
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self._buckets.reduce()
        return total

    def _loss(self, ids_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
        with torch.autocast("cpu", dtype=self.autocast, enabled=self.autocast is not None):
            logits_BTV = self.model(ids_BT[:, :-1], documents_BT)
        return loss_sum(logits_BTV, ids_BT[:, 1:])


def document_numbers(windows: Windows) -> Tensor:
    """For each input position the number of its document within the row: int64 (B, T)."""
    rows, length = windows.tokens_BT.shape
    begins: np.ndarray[Any, np.dtype[np.int64]] = np.zeros((rows, length), np.int64)
    for row in range(rows):
        begins[row, windows.ends_of(row)] = 1
    return torch.from_numpy(begins.cumsum(1)[:, :-1])


def _check_finite(step: int, losses: np.ndarray[Any, np.dtype[np.float64]], norm: float) -> None:
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise DivergedError(
            f"the run diverged: at step {step + 1} the loss of rank {', '.join(map(str, bad))} is {losses[bad[0]]}"
        )
    if not math.isfinite(norm):
        raise DivergedError(
            f"the run diverged: at step {step + 1} the norm of the summed gradients is {norm} on all ranks"
        )
