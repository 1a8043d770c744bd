"""One step of training: read, compute, reduce, update."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpillm.comm.clock_sync import clock_offset
from mpillm.comm.communicator import silent
from mpillm.comm.failure import ranks_text
from mpillm.comm.mesh import Mesh
from mpillm.errors import DivergedError
from mpillm.infer.evaluate import rows_at_once
from mpillm.machine.cluster_profile import ClusterProfile
from mpillm.parallel.pipeline.simulate import Span
from mpillm.parallel.pipeline.stage import Batch
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.parallel.step_plan import StepPlan
from mpillm.tokens.reader import TokenReader
from mpillm.tokens.sampler import Sampler
from mpillm.tokens.windows import Windows
from mpillm.train.lr_schedule import learning_rate
from mpillm.train.optimizers.adamw import make_optimizer, set_rate
from mpillm.train.recipe import Recipe
from mpillm.train.step_stats import StepStats, gather_stats, pipelines_of


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over the global batch, nats a token, from the weights before the update. `shared`: what all ranks
    told. `spans`: when this rank computed, and `others`: what it did besides, in seconds of perf_counter.
    """

    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    shared: StepStats
    spans: list[Span]
    others: list[tuple[str, float, float]]


class Trainer:
    """Model, optimizer, gradients and samples of one rank; `step` runs them. Every rank of the mesh steps alike."""

    def __init__(
        self,
        recipe: Recipe,
        reader: TokenReader,
        mesh: Mesh,
        layout: StepPlan,
        profile: ClusterProfile | None = None,
        warn: Callable[[str], None] = silent,
    ) -> None:
        """`profile`: the cluster's, which chooses how ranks talk; `warn` is told what had to be done without."""
        self.recipe, self.mesh, self.layout = recipe, mesh, layout
        self.model = ShardedModel(
            recipe.model,
            recipe.train.seed,
            mesh,
            layout,
            recipe.parallel,
            fixed_order=recipe.train.fixed_order,
            autocast=torch.bfloat16 if recipe.train.dtype == "bfloat16" else None,
            profile=profile,
            scored_rows=rows_at_once(recipe.model),
            warn=warn,
        )
        self.weights = self.model.named_weights()
        self.optimizer = make_optimizer(self.weights.values(), recipe.optimizer)
        self._sampler = Sampler(
            reader,
            recipe.model.context,
            recipe.train.batch,
            recipe.train.seed,
            boundaries=recipe.data.document_mask,
        )
        self.clock_offset = clock_offset(mesh.comm)
        self._pipelines = pipelines_of(mesh, layout)

    def describe(self) -> str:
        """How gradients meet: `2 buckets by shared, after the backward pass`."""
        buckets = self.model.buckets
        count, when = len(buckets.buckets), "behind" if buckets.behind else "after"
        by = " and ".join(buckets.algorithms)
        return f"{count} bucket{'s' * (count != 1)} by {by}, {when} the backward pass"

    def describe_pipeline(self) -> str:
        """How streams pass between stages: `handed over by shared`."""
        pipeline = self.model.pipeline
        ways = " and ".join(pipeline.ways)
        return f"{self.layout.schedule.stages} on {pipeline.axis.size} ranks, handed over by {ways}"

    def close(self) -> None:
        """Give shared memory back. Every rank calls it, after the last step."""
        self.model.close()

    def step(self, step: int, wish: int = 0) -> StepResult:
        """Step number `step`, counted from 0; `wish` comes to all ranks with it.

        Raises DivergedError on all ranks when a number is no longer finite.
        """
        clock = time.perf_counter
        begun = clock()
        batch = self._batch(step)
        read = clock()
        passes = self.model.train(batch)
        shared = gather_stats(
            self.mesh, self.layout, passes, self.clock_offset, wish, self._pipelines
        )
        norm = self.model.clip_(self.recipe.optimizer.clip)
        _check_finite(step, shared.losses, norm)
        reduced = clock()
        rate = learning_rate(self.recipe.optimizer, step, self.recipe.train.steps)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        # Exact, so neither the order nor the layout matters.
        loss = math.fsum(loss for row in shared.losses.values() for loss in row)
        ended = clock()
        others = [
            ("read", begun, read),
            ("reduce", passes.ended, reduced),
            ("update", reduced, ended),
        ]
        return StepResult(loss, rate, norm, ended - begun, shared, passes.spans, others)

    def _batch(self, step: int) -> Batch:
        """This rank's share of the batch; all ranks of a pipeline read the same, if they need it at all."""
        recipe, layout, model = self.recipe, self.layout, self.model
        # Each microbatch adds its share of the mean over the global batch, so microbatches need not be equal.
        scale = recipe.train.batch * recipe.model.context
        if not (model.begins or model.ends or recipe.data.document_mask):
            return Batch([], [None] * layout.microbatches, scale)
        first = self.mesh.axis("data").rank * layout.rows
        windows = self._sampler.windows(step, first, layout.rows)
        ids_BT = torch.from_numpy(windows.tokens_BT.astype(np.int64))
        documents_BT = document_numbers(windows) if recipe.data.document_mask else None
        return Batch(
            [ids_BT[a:b] for a, b in layout.bounds],
            [None if documents_BT is None else documents_BT[a:b] for a, b in layout.bounds],
            scale,
        )


def document_numbers(windows: Windows) -> Tensor:
    """For each input position the number of its document within the row: int64 (B, T)."""
    rows, length = windows.tokens_BT.shape
    begins: np.ndarray[Any, np.dtype[np.int64]] = np.zeros((rows, length), np.int64)
    for row in range(rows):
        begins[row, windows.ends_of(row)] = 1
    return torch.from_numpy(begins.cumsum(1)[:, :-1])


def _check_finite(step: int, losses: dict[int, list[float]], norm: float) -> None:
    bad = {rank: row for rank, row in losses.items() if not np.isfinite(row).all()}
    if bad:
        first = next(loss for row in bad.values() for loss in row if not math.isfinite(loss))
        raise DivergedError(
            f"the run diverged: at step {step + 1} the loss of {ranks_text(list(bad))} is {first}"
        )
    if not math.isfinite(norm):
        raise DivergedError(
            f"the run diverged: at step {step + 1} the norm of the summed gradients is {norm} on all ranks"
        )
