"""One step of training: read, compute, reduce, update."""

import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpillm.comm.clock_sync import clock_offset
from mpillm.comm.communicator import silent
from mpillm.comm.mesh import Mesh
from mpillm.errors import DataError, DivergedError
from mpillm.infer.references import References
from mpillm.machine.cluster_profile import ClusterProfile
from mpillm.models.adapt import tuned_shapes
from mpillm.models.part_module import Fields
from mpillm.parallel.axis_sizes import batch_share, counts_loss
from mpillm.parallel.passes import Passes
from mpillm.parallel.pipeline.simulate import Span
from mpillm.parallel.pipeline.stage import Batch
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.parallel.step_plan import StepPlan
from mpillm.plan.peak_memory import rows_at_once
from mpillm.tasks.task import Task
from mpillm.tokens.order import dropout_keys
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.samples import RowShape, SampleReader
from mpillm.train.islands import Islands
from mpillm.train.kept_zeros import KeptZeros
from mpillm.train.loss_scale import LossScale
from mpillm.train.lr_schedule import learning_rate
from mpillm.train.optimizers.optimizer import (
    check_whole,
    make_optimizer,
    set_rate,
    whole_shape,
)
from mpillm.train.recipe import Recipe
from mpillm.train.reference_point import ReferencePoint
from mpillm.train.rollouts.rollouts import Rollouts
from mpillm.train.run_plan import row_lengths
from mpillm.train.step_stats import StepStats, check_finite, gather_stats
from mpillm.weights.names import module_names, weight_name
from mpillm.weights.slices import Held, TensorSlice, slices_of, split_run


@dataclass(frozen=True)
class StepResult:
    """The results of one step."""

    loss: float
    """The mean over the global batch, in nats a target, with the weights before the update."""
    learning_rate: float
    grad_norm: float
    """Of the summed gradients, before they are clipped."""
    seconds: float
    stats: StepStats
    spans: list[Span]
    """When this rank computed on the stages of the pipeline."""
    others: list[tuple[str, float, float]]
    """The rest of the step: (name, begin, end), in seconds of perf_counter."""
    loss_scale: float = 1.0
    """The factor of the gradients in the backward pass; 1 but for float16."""
    repeats: int = 0
    """How often the step was computed again with a lower loss scale."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """The parts of the loss before their factors, by name: means as the loss."""
    noise_scale: float | None = None
    """In sequences; None where it was not measured, or the gradient is lost in its noise."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Of answers that the model wrote for the step: their mean reward and others, by name."""


class _Update(NamedTuple):
    """The results of one update of the weights."""

    passes: Passes
    stats: StepStats
    norm: float
    scale: float
    """The loss scale."""
    repeats: int
    reduced: float
    """When the gradients were summed and clipped, in seconds of perf_counter."""
    rate: float


class Trainer:
    """Model, optimizer, gradients and samples of one rank.

    Every rank of the mesh makes one, and calls its methods together with the others.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        reader: SampleReader,
        mesh: Mesh,
        plan: StepPlan,
        profile: ClusterProfile | None = None,
        warn: Callable[[str], None] = silent,
    ) -> None:
        """Build the rank's parts. `profile`: the cluster's. `warn` receives each fallback."""
        self.recipe, self.task, self.mesh, self.plan = recipe, task, mesh, plan
        self.model = ShardedModel(
            recipe.model,
            task,
            recipe.train.seed,
            mesh,
            plan,
            recipe.parallel,
            profile=profile,
            scored_rows=rows_at_once(recipe.model),
            warn=warn,
            needs_whole=recipe.optimizer.needs_whole,
        )
        self.stepped = self.model.stepped
        self.optimizer = make_optimizer(recipe.optimizer, self.stepped)
        self.islands: Islands | None = None
        if mesh.find("island") is not None:
            self.islands = Islands(recipe, mesh, self.stepped, profile, warn, self.held)
        self.loss_scale = LossScale.make(plan.precision.scales_loss)
        if not recipe.optimizer.elementwise:
            trained = tuned_shapes(recipe.model, plan.tuning).trained
            whole = {name: shape for name, (_, shape) in trained.items()}
            stepped = {name: tuple(weight.shape) for name, weight in self.stepped.items()}
            check_whole(recipe.optimizer, stepped, whole)
        documents = recipe.data.numbers_documents(task)
        row = RowShape.of(task, row_lengths(recipe, plan), documents)
        self._samples = reader.steps(row, recipe.train.batch, recipe.train.seed)
        offered = {*task.field_names, *(["documents"] if documents else [])}
        self._reads_fields = self.model.reads_fields(sorted(offered))
        self._first_row = batch_share(mesh.sizes, mesh.coordinates)[0] * plan.rows
        self.references: References | None = None
        """What the weights at the start say, of a task that needs it; set before the first step."""
        self._reference_point: ReferencePoint | None = None
        if task.needs_baseline:
            assert isinstance(reader, PairReader)
            settings, first = recipe.train, self._first_row
            self._reference_point = ReferencePoint(
                self.model, reader, settings.batch, settings.seed, first
            )
        self.rollouts: Rollouts | None = None
        """Of a task whose model writes answers; set before the first step."""
        self._kept: KeptZeros | None = None
        self.updates = recipe.task.updates if task.writes_answers else 1
        """How often a step updates the weights."""
        self._reading = _reading_thread(self.model.device)
        self._ahead: tuple[int, Future[list[Fields]] | None] = (-1, None)
        self.clock_offset = clock_offset(mesh.comm, mesh.node_map)

    def restored(self, facts: Mapping[str, Any]) -> None:
        """Continue from what a checkpoint has filled, and from its `facts`."""
        self.model.filled()
        self.loss_scale.restore(facts)

    def frozen_tensors(self) -> dict[str, Held]:
        """Return the frozen weights that a checkpoint holds, in float32; those of adapters' base
        are none. After a checkpoint has filled them, pass them to `take_frozen`.
        """
        if self.recipe.adapter.used:
            return {}
        plain = self.model.frozen.plain()
        return {weight_name(name): self._of_whole(name, weight) for name, weight in plain.items()}

    def take_frozen(self, tensors: Mapping[str, Held]) -> None:
        """Take what a checkpoint has filled."""
        for name, stored in module_names(tensors).items():
            self.model.frozen.take(name, slices_of(tensors[stored])[0].tensor)

    def held(self, name: str, tensor: Tensor) -> Held:
        """Return `tensor`, the weight `name` as it is stepped on or a state of it, as slices of the
        whole tensor.
        """
        stepped = self.stepped[name]
        whole = whole_shape(stepped)
        held: Held = tensor
        if tuple(stepped.shape) != whole:
            held = split_run(tensor.detach().view(-1), self.model.first_element(name), whole)
        return self._of_whole(name, held)

    def _of_whole(self, name: str, held: Held) -> Held:
        """Return slices of a part of the weight as slices of the whole one."""
        cut = self.model.cut_of(name)
        if cut is None:
            return held
        return [
            TensorSlice(part.tensor, tuple(map(operator.add, part.start, cut.start)), cut.shape)
            for part in slices_of(held)
        ]

    def describe_pipeline(self) -> str:
        """Return how streams pass between stages: `2 on 2 ranks, passed by shared`."""
        pipeline = self.model.pipeline
        ways = " and ".join(pipeline.ways)
        return f"{self.plan.schedule.stages} on {pipeline.axis.size} ranks, passed by {ways}"

    def close(self) -> None:
        """Free shared memory. Every rank calls it, after the last step."""
        if self._reading is not None:
            self._reading.shutdown()
        if self.islands is not None:
            self.islands.close()
        self.model.close()

    def step(self, step: int, stop: int = 0) -> StepResult:
        """Run step number `step` (from 0): read, compute, reduce, update.

        `stop`: this rank's stop request (stopping.py), which reaches all ranks with its losses.
        Raises DivergedError on all ranks when a loss or the norm is not finite. Where float16
        overflows, the step is computed again with a lower loss scale: no sample is passed over.
        """
        clock, islands = time.perf_counter, self.islands
        begun = clock()
        summing = None
        if islands is not None:
            islands.begin_step(step)
            summing = islands.summing(step)
        batch, figures = self._batch(step)
        if self._reference_point is not None:
            together = self.mesh.comm if self._parts(step) == 1 else self.model.island_comm
            batch = self._reference_point.add(batch, step, together)
        self._prefetch(step + 1)
        read = clock()
        first = last = self._update(batch, step, stop, summing)
        for _ in range(1, self.updates):
            last = self._update(batch, step, stop, summing)
        ended = clock()
        others = [
            ("read", begun, read),
            ("reduce", last.passes.ended, last.reduced),
            ("update", last.reduced, ended),
        ]
        return StepResult(
            # The mean of the islands' means.
            first.stats.loss / self._parts(step),
            last.rate,
            first.norm,
            ended - begun,
            last.stats,
            last.passes.spans,
            others,
            last.scale,
            first.repeats,
            {name: part / self._parts(step) for name, part in first.stats.parts.items()},
            first.passes.noise_scale,
            figures,
        )

    def _update(
        self,
        batch: Batch,
        step: int,
        stop: int,
        summing: Callable[[Sequence[Tensor]], None] | None,
    ) -> _Update:
        """Run the passes of a batch, and update the weights. Raises DivergedError."""
        repeats, islands = 0, self.islands
        every = self.recipe.train.noise_scale
        measure = bool(every) and (step + 1) % every == 0
        while True:
            passes = self.model.train(batch, self.loss_scale.value, measure, summing)
            stats = gather_stats(self.mesh, passes, self.plan, self.clock_offset, stop)
            norm = self.model.clip_(
                self.recipe.optimizer.clip,
                loss_scale=self.loss_scale.value,
                max_value=self.recipe.optimizer.clip_value,
                squares=passes.squares,
            )
            norm = norm if islands is None else islands.largest(norm)
            fault = check_finite(step, stats.losses, norm)
            # A loss that is not finite comes from the forward pass: the scale does not change it.
            if not fault or not math.isfinite(stats.loss) or not self.loss_scale.lower():
                break
            repeats += 1
        scale = self.loss_scale.value
        if fault:
            raise DivergedError(f"the run diverged: {fault}{self._float16_remedy()}")
        reduced = time.perf_counter()
        rate = learning_rate(self.recipe.optimizer, step, self.recipe.train.steps)
        set_rate(self.optimizer, rate)
        kept = self._kept_zeros()
        self.optimizer.step()
        if kept is not None:
            kept.restore()
        if islands is not None:
            islands.end_step(step + 1)
        self.model.gradients.updated()
        self.loss_scale.step_taken()
        return _Update(passes, stats, norm, scale, repeats, reduced, rate)

    def _kept_zeros(self) -> KeptZeros | None:
        """Return the zeros that stay, found ahead of the first update; None: none do."""
        if self.recipe.train.keep_zeros and self._kept is None:
            layers = tuned_shapes(self.recipe.model, self.plan.tuning).layers
            self._kept = KeptZeros.of(self.stepped, layers)
        return self._kept

    def _float16_remedy(self) -> str:
        if not self.loss_scale.dynamic:
            return ""
        return (
            f" in float16 (loss scale {self.loss_scale.value:g}), which ends at 65,504; "
            "bfloat16 and float32 do not: --set train.dtype=bfloat16"
        )

    def _batch(self, step: int) -> tuple[Batch, Mapping[str, float]]:
        """Read this rank's share of the batch: the same rows on all ranks of a pipeline. Where the
        model writes it, return what is recorded of it, too.
        """
        figures: Mapping[str, float] = {}
        if self.rollouts is not None:
            written = self.rollouts.batch(step, self._first_row)
            fields, figures = self._with_dropout(written.fields, step), written.figures
        else:
            ahead, coming = self._ahead
            fields = coming.result() if coming and ahead == step else self._fields(step)
        rows, context = self.recipe.train.batch // self._parts(step), self.recipe.model.context
        # Each microbatch adds its share of the mean over the global batch, or an island's part of
        # it, so microbatches need not be equal.
        weight = self.task.fixed_weight(rows, context)
        scale = self._batch_weight(fields, step) if weight is None else weight
        return Batch(fields, scale, rows), figures

    def _parts(self, step: int) -> int:
        """Return in how many parts, each alone, the batch of `step` is trained."""
        return 1 if self.islands is None else self.islands.parts(step)

    def _prefetch(self, step: int) -> None:
        """Read the batch of `step` while a GPU computes; CPUs have no core to spare for it."""
        # What the model writes comes from the weights of its step.
        if self.rollouts is not None:
            return
        if self._reading is not None and step < self.recipe.train.steps:
            self._ahead = step, self._reading.submit(self._fields, step)

    def _fields(self, step: int) -> list[Fields]:
        """Read the fields of each microbatch of this rank; empty where its stages read none."""
        plan = self.plan
        whole: dict[str, Tensor] = {}
        if self._reads_fields:
            read = self.task.fields(self._samples.raw(step, self._first_row, plan.rows))
            whole.update(self.model.own_positions(read))
        stay = self.recipe.model.host_inputs
        whole = {name: f if name in stay else self._on_device(f) for name, f in whole.items()}
        placed = self.model.placed
        cut: list[Fields] = [
            {**{name: field[a:b] for name, field in whole.items()}, **placed}
            for a, b in plan.bounds
        ]
        return self._with_dropout(cut, step)

    def _with_dropout(self, fields: list[Fields], step: int) -> list[Fields]:
        """Add the key of each row's dropout masks, where the model has any."""
        if not (self.recipe.model.drops or self.recipe.adapter.dropout):
            return fields
        plan, seed = self.plan, self.recipe.train.seed
        keys = torch.from_numpy(dropout_keys(seed, step, self._first_row, plan.rows))
        if "dropout_keys" not in self.recipe.model.host_inputs:
            keys = self._on_device(keys)
        return [
            {**each, "dropout_keys": keys[a:b]}
            for each, (a, b) in zip(fields, plan.bounds, strict=True)
        ]

    def _on_device(self, field: Tensor) -> Tensor:
        device = self.model.device
        if device.type == "cpu":
            return field
        # From pinned memory the copy is asynchronous. A view with gaps would take its way through
        # other memory, and wait for all work that the GPU has.
        return field.contiguous().pin_memory().to(device, non_blocking=True)

    def _batch_weight(self, fields: list[Fields], step: int) -> float:
        """Add up the weights of all microbatches of the ranks that train together.

        Every rank of the mesh calls it.
        """
        # The ranks that compute the loss count it: the others of a pipeline hold the same rows, or
        # none.
        counts = self.model.ends and counts_loss(self.mesh.coordinates)
        own = [self.task.weight(each) for each in fields] if counts else []
        island = 0 if self._parts(step) == 1 else self.mesh.coordinates["island"]
        weights: dict[int, list[float]] = {}
        for number, part in self.mesh.comm.allgather((island, own)):
            weights.setdefault(number, []).extend(part)
        # Summed exactly: the order of ranks leaves no trace.
        totals = {number: math.fsum(parts) for number, parts in weights.items()}
        if not all(totals.values()):
            raise DataError(
                "a batch has no target that counts, so its loss has no mean; "
                "raise train.batch, or check the data and the task"
            )
        return totals[island]


def _reading_thread(device: torch.device) -> ThreadPoolExecutor | None:
    """Make the thread that reads ahead for a GPU; None for the CPU."""
    if device.type == "cpu":
        return None
    # A new thread's current GPU is number 0, on which it would take memory for a context.
    return ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,))
