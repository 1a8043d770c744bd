"""A rank's share of a model under training: its parts, their gradients, its channels to others."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mpillm.comm.communicator import silent
from mpillm.comm.mesh import Axis, Mesh
from mpillm.errors import LayoutError
from mpillm.machine.cluster_profile import ClusterProfile
from mpillm.models.adapt import tune
from mpillm.models.part_module import Fields, PartModule, build_without_values, initialise
from mpillm.models.spec import ModelSpec, Part
from mpillm.parallel.axis_sizes import (
    batch_share,
    counts_loss,
    outermost_axes,
    replicated_axes,
    token_axes,
)
from mpillm.parallel.compiling import compile_layers, uncompiled
from mpillm.parallel.context.sequence_share import SequenceShare
from mpillm.parallel.data.frozen_weights import FrozenWeights
from mpillm.parallel.data.zero import NeedsWhole, cuts_all
from mpillm.parallel.devices import own_device
from mpillm.parallel.expert.expert_parallel import ExpertParallel
from mpillm.parallel.grad_norm import clip_gradients_, square_sums
from mpillm.parallel.make_gradients import make_gradients
from mpillm.parallel.noise_scale import NoiseMeter
from mpillm.parallel.passes import Passes, by_part, on_host
from mpillm.parallel.pipeline.executor import Pipeline
from mpillm.parallel.pipeline.schedules.forward_only import forward_only
from mpillm.parallel.pipeline.stage import (
    Batch,
    BatchScore,
    ModelStage,
    OfRows,
    PipelineStage,
    ScoringStage,
)
from mpillm.parallel.pipeline.stream_transport import StreamShapes
from mpillm.parallel.pipeline.tying import TiedWeight
from mpillm.parallel.precision import lower_, torch_dtype
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import StepPlan, replica_share, scored_ahead
from mpillm.parallel.teacher import Teacher, teach
from mpillm.parallel.tensor.tensor_parallel import TensorParallel
from mpillm.parallel.tensor.weight_cuts import WeightCut
from mpillm.tasks.task import Task


class ShardedModel:
    """The model parts of one rank.

    Every rank of `mesh` makes it, with the same arguments, and calls its methods together with the
    others.
    """

    def __init__(
        self,
        spec: ModelSpec,
        task: Task,
        seed: int,
        mesh: Mesh,
        plan: StepPlan,
        settings: ParallelSettings,
        *,
        profile: ClusterProfile | None = None,
        scored_rows: int = 1,
        warn: Callable[[str], None] = silent,
        needs_whole: NeedsWhole = cuts_all,
    ) -> None:
        """Build and initialise the rank's parts.

        `scored_rows`: the most sequences at once in `score`. `profile`, `warn`: as in Communicator.
        `needs_whole`: the weights that the optimizer needs whole.
        """
        self.spec, self.task, self.mesh, self.plan = spec, task, mesh, plan
        self._scored_rows = scored_rows
        axis, schedule = mesh.axis("pipeline"), plan.schedule
        self.device = device = own_device(plan.precision.device)
        self._tokens = tokens = mesh.joint(token_axes(mesh.sizes))
        # On GPUs weights that are gathered have memory in passes alone.
        cut = settings.experts > 1 or settings.tensor > 1
        on_host = settings.zero == 3 and tokens.size > 1 and not cut
        self.parts: dict[int, PartModule] = {
            stage: _build(spec, plan.parts[stage], device, on_host)
            for stage in schedule.stages_of(axis.rank)
        }
        parts = list(self.parts.values())
        for part in parts:
            tune(part, plan.tuning)
        along = mesh.find("tensor")
        self.tensor = None if along is None else TensorParallel(along, settings, profile, warn)
        if self.tensor is not None:
            for part in parts:
                self.tensor.cut(part)
        self.experts = self._share_experts(settings, profile, warn)
        self.frozen = self._freeze(seed, warn)
        """The weights that no step changes."""
        # Before leaves share memory, and before gradients get their dtype.
        values = self._initialise(seed, settings.zero > 0 and tokens.size > 1)
        for part in parts:
            part.set_recompute(plan.recompute)
        # With one stage the tied head shares the embedding's Parameter. fixed_order needs a
        # separate leaf there too: autograd would add both gradients in another order.
        apart = schedule.stages > 1 or plan.fixed_order
        self._tied = [
            TiedWeight(parts, leader, followers, axis, warn, plan.fixed_order)
            for leader, followers in (_followers(spec).items() if apart else ())
            if not plan.tuning.is_frozen(leader)
        ]
        shared = {*spec.tied_weights, *spec.tied_weights.values()}
        self._leaves_of_tied = [
            weight
            for part in parts
            for name, weight in part.named_parameters(remove_duplicate=False)
            if name in shared and weight.requires_grad
        ]
        self.gradients = make_gradients(
            parts,
            tokens,
            plan,
            settings,
            self.experts,
            comm=mesh.comm,
            replica=replica_share(mesh, token_axes(mesh.sizes)),
            profile=profile,
            warn=warn,
            needs_whole=needs_whole,
        )
        self._weights = self.named_weights()
        self.stepped = self.gradients.optimizer_weights(self._weights, values)
        """What the optimizer steps on, by the names of the weights in the whole model."""
        self.gradients.initialise(parts, seed, self.frozen)
        gathers = self._gathers()
        self.alike = gathers or self.experts is not None
        """Whether all ranks must score equally many batches: each needs weights, or the computed
        experts, of the others.
        """
        self.compiled = plan.compiled and compile_layers(
            parts, plan.microbatch, mesh.comm, mesh.node_map, warn
        )
        # Islands may hold other gradients than each other: a norm is that of one island.
        outermost = outermost_axes(mesh.sizes)
        together = [name for name in mesh.sizes if name not in outermost]
        self.island_comm = mesh.joint(together).comm if outermost else mesh.comm
        """The ranks that train together: those of one island, or all."""
        self._stages = {
            stage: ModelStage(part, number, self.gradients, task)
            for number, (stage, part) in enumerate(self.parts.items())
        }
        self._teacher: Teacher | None = None
        self.pipeline = self._make_pipeline(settings, profile, warn)
        if self.gradients.gathered and schedule.ranks > 1:
            # As experts do: the ranks that a gather waits for may wait for streams of this one.
            self.gradients.gathered.progress = self.pipeline.progress

    def _gathers(self) -> bool:
        """Return whether any rank gathers weights. Raises LayoutError where that cannot be."""
        gathers = any(self.mesh.comm.allgather(bool(self.gradients.gathered)))
        if gathers and self.plan.compiled:
            raise LayoutError(
                "parallel.zero = 3 gathers the weights layer by layer where ranks share no memory, "
                "which train.compile = true cannot do for compiled layers; take parallel.zero = 2, "
                "or train.compile = false"
            )
        return gathers

    def _freeze(self, seed: int, warn: Callable[[str], None]) -> FrozenWeights:
        """Place the frozen weights; those of adapters' base have no values yet."""
        dtype = torch_dtype(self.plan.precision.dtype)
        frozen = FrozenWeights(list(self.parts.values()), self.mesh, dtype, self.device, warn)
        if not self.plan.tuning.adapter.used:
            frozen.initialise(seed)
        return frozen

    def _reading(self) -> AbstractContextManager[None]:
        """Let passes read the weights. Every rank enters it."""
        gathered = self.gradients.gathered
        return gathered.reading() if gathered else nullcontext()

    def _make_pipeline(
        self,
        settings: ParallelSettings,
        profile: ClusterProfile | None,
        warn: Callable[[str], None],
    ) -> Pipeline:
        """Share out the positions, and join the stages by channels."""
        spec, mesh, plan, device = self.spec, self.mesh, self.plan, self.device
        # Channels have a fixed capacity: that of the largest stream of training and scoring.
        rows = max(plan.microbatch, self._scored_rows)
        dtype = torch_dtype(plan.precision.dtype)
        context = mesh.find("context")
        self._share: SequenceShare | None = None
        if context is not None:
            cuts = mesh.sizes.get("tensor", 1)
            self._share = SequenceShare(
                context,
                list(self.parts.values()),
                rows,
                dtype,
                device,
                settings,
                cuts,
                profile,
                warn,
            )
        # Every microbatch of a pipeline has the same number of rows.
        length = spec.context if self._share else 0
        shapes = [
            self._stream_shapes(stage, plan.microbatch, length) for stage in range(len(plan.parts))
        ]
        self._streams = StreamShapes(lambda stage, microbatch: shapes[stage], dtype, device)
        nbytes = dtype.itemsize * rows * spec.largest_stream // plan.context
        axis = mesh.axis("pipeline")
        return Pipeline(axis, plan.schedule, nbytes, settings.handover, profile, warn)

    def _initialise(self, seed: int, is_cut: bool) -> dict[nn.Parameter, Tensor]:
        """Set initial values; return those in float32 of weights of a lower dtype."""
        values: dict[nn.Parameter, Tensor] = {}
        for part in self.parts.values():
            # Shards move the weights before they have values; those of experts stay.
            trained = [each for each in part.named_weights() if each[1].requires_grad]
            own = [each for each in trained if not is_cut or self._is_expert(each[1])]
            initialise(part, seed, own)
            values |= lower_([weight for _, weight in own], self.plan.precision)
        return values

    def _share_experts(
        self,
        settings: ParallelSettings,
        profile: ClusterProfile | None,
        warn: Callable[[str], None],
    ) -> ExpertParallel | None:
        """Take the experts of other ranks out of the parts, where ranks share them out."""
        size, count = settings.experts, self.spec.experts
        if size == 1:
            return None
        shared = ExpertParallel(
            self._tokens, size, count, profile=profile, debug=settings.debug, warn=warn
        )
        for part in self.parts.values():
            shared.cut(part)
        if self.plan.schedule.ranks > 1:
            # A stage that waits for its group must send meanwhile: ranks of the group may wait for
            # other stages, and these for what this rank has made.
            shared.exchange.progress = lambda: self.pipeline.progress()
        return shared

    def _is_expert(self, weight: nn.Parameter) -> bool:
        """Return whether `weight` is that of an expert, which other ranks do not hold."""
        return self.experts is not None and weight in self.experts

    @property
    def share(self) -> tuple[int, int]:
        """(i, n): this rank scores the i-th of n shares of the batches, one share a pipeline."""
        return batch_share(self.mesh.sizes, self.mesh.coordinates)

    @property
    def ends(self) -> bool:
        """Whether this rank holds the stage that computes the loss."""
        return any(part.ends for part in self.parts.values())

    def own_positions(self, fields: Fields) -> Fields:
        """Keep this rank's positions of the fields of whole sequences in training."""
        return self._share.deal(fields) if self._share else fields

    @property
    def placed(self) -> Fields:
        """The fields of every microbatch in training that say which positions are this rank's."""
        return self._share.placed() if self._share else {}

    def reads_fields(self, offered: Sequence[str]) -> bool:
        """Return whether a stage of this rank reads any of the `offered` fields."""
        shared = set(self.spec.shared_inputs).intersection(offered)
        return bool(shared) or any(part.begins or part.ends for part in self.parts.values())

    def _entered(
        self,
        stages: Mapping[int, PipelineStage],
        shape_of: Callable[[int], tuple[int, int]],
        rows: int,
    ) -> Mapping[int, PipelineStage]:
        """Return the stages as the pipeline runs them, with batches of `rows` at most."""
        if self.tensor is None:
            return stages
        nbytes = rows * self.spec.largest_stream * self.plan.precision.element_bytes
        # Ranks share host memory, and on GPUs no stream is there.
        room = nbytes // self.plan.context if self.device.type == "cpu" else 0
        return self.tensor.entered(stages, shape_of, room)

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Return the weights that this rank trains, by their names in the whole model.

        A tied weight that shares another's memory is left out. Its copy on another rank has the
        name of the saved weight.
        """
        shared = [weight for tied in self._tied for weight in tied.sharing_memory]
        return {
            name: weight
            for part in self.parts.values()
            for name, weight in part.named_weights()
            if weight.requires_grad and not any(weight is other for other in shared)
        }

    def train(
        self,
        batch: Batch,
        loss_scale: float = 1.0,
        measure: bool = False,
        sum_further: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> Passes:
        """Run all passes of a step; leave the global batch's gradients in `grad` of `stepped`,
        multiplied by `loss_scale`.

        `batch`: this rank's share. All ranks of a pipeline get the same rows of it. `measure`: the
        noise scale too. `sum_further`: sums gradients over ranks that the GradientSync does not
        know.
        """
        if self._share:
            self._share.begin()
        meter = NoiseMeter(self.mesh, self.plan, self._leaves_of_tied) if measure else None
        self.gradients.begin(meter.add if meter else None)
        for stage in self._stages.values():
            stage.batch, stage.loss_scale = batch, loss_scale
        bounds = self.plan.bounds

        def shape_of(microbatch: int) -> tuple[int, int]:
            first, last = bounds[microbatch]
            whole = self.spec.context
            # With a share of each sequence, some fields are of the whole one.
            length = self._own_length(whole) if self._share else _length(batch.fields[microbatch])
            return last - first, length or whole

        stages = self._entered(self._stages, shape_of, self.plan.microbatch)
        with self._reading():
            spans = self.pipeline.run(self.plan.schedule, stages, self._streams)
        ended = time.perf_counter()
        # First over the data axis, then between the two leaves of a tied weight: one order of sums
        # in every layout.
        self.gradients.finish()
        if self.tensor is not None:
            self.tensor.sum_replicated(self.gradients.gradient_of)
        if sum_further is not None:
            sum_further(self._all_gradients())
        for tied in self._tied:
            tied.reduce(self.gradients.gradient_of)
        summed = time.perf_counter()
        noise = meter.noise_scale(self.gradients, self.mesh.comm) if meter else None
        losses = [stage.losses for stage in self._stages.values() if stage.losses]
        by_number = [losses[0][number] for number in range(self.plan.microbatches if losses else 0)]
        numbers, squares = on_host(by_number, self._squares())
        if on_device := self.pipeline.device_spans():
            # Work was only enqueued before: the copy to the host has waited for its end.
            spans, ended, summed = on_device, on_device[-1].end, time.perf_counter()
        losses_of, *parts = by_part(numbers, 1 + len(self.plan.loss_parts))
        return Passes(losses_of, parts, spans, ended, summed, squares, noise)

    def learn_from(self, warn: Callable[[str], None]) -> Teacher:
        """Make the teacher of the plan, whose weights have no values yet. Every rank calls it."""
        self._teacher = teach(self._stages.values(), self.plan, self.mesh, warn)
        return self._teacher

    def _all_gradients(self) -> list[Tensor]:
        """Return what the optimizer will step on, and the gradients that tying adds to it."""
        own = [each.grad for each in self.stepped.values() if each.grad is not None]
        leaves = [leaf for tied in self._tied for leaf in tied.sharing_memory]
        return own + [self.gradients.gradient_of(leaf) for leaf in leaves if leaf.requires_grad]

    def _squares(self) -> Tensor:
        counted = self.gradients.counted_gradients(self._replica, self._counted_elsewhere)
        return square_sums(counted)

    @property
    def _replica(self) -> tuple[int, int]:
        """(i, n): this rank counts the i-th of n shares of the gradients that n ranks hold."""
        apart = token_axes(self.mesh.sizes) if self.gradients.is_cut else ()
        return replica_share(self.mesh, apart)

    @property
    def replicas(self) -> list[tuple[Iterable[Tensor], Axis]]:
        """What ranks hold alike: weights, with the axis along which they are the same.

        Every rank iterates over all of them, once.
        """
        held = self._weights if self.gradients.is_cut else self.stepped
        experts = {name for name, weight in self._weights.items() if self._is_expert(weight)}
        dense = [weight for name, weight in held.items() if name not in experts]
        gathered = self.gradients.gathered
        # Ranks that gather from the same owners would compare these values with themselves.
        same = token_axes(self.mesh.sizes) if gathered and not gathered.nodes_apart else ()
        found: list[tuple[Iterable[Tensor], Axis]] = [
            (gathered.read_each(dense) if gathered else dense, axis)
            for axis in replicated_axes(self.mesh)
            if axis.name not in same
        ]
        if self.experts is not None:
            found.append(([self.stepped[name] for name in sorted(experts)], self.experts.owners))
        return found

    def first_element(self, name: str) -> int:
        """Return which element of the weight `name` is the first that `stepped` holds of it."""
        return self.gradients.first_element(self._weights[name])

    def cut_of(self, name: str) -> WeightCut | None:
        """Return which part of the weight `name` this rank has; None: all of it."""
        return self.tensor.cuts.get(name) if self.tensor else None

    @property
    def _counted_elsewhere(self) -> list[nn.Parameter]:
        """A gradient that is in several places; the norm counts it in one."""
        elsewhere = self.tensor.counted_elsewhere if self.tensor else []
        return elsewhere + [weight for tied in self._tied for weight in tied.counted_elsewhere]

    def clip_(
        self,
        max_norm: float,
        *,
        loss_scale: float = 1.0,
        max_value: float = 0.0,
        squares: Sequence[float] | None = None,
    ) -> float:
        """Divide the gradients by `loss_scale`, clamp elements to ± `max_value`, then scale to a
        norm of `max_norm` at most (0: any). Returns the norm before both.

        `squares`: those of the passes; None waits for the device again.
        """
        return clip_gradients_(
            self.gradients,
            self.island_comm,
            self._replica,
            max_norm or math.inf,
            self._counted_elsewhere,
            loss_scale,
            max_value or math.inf,
            squares,
        )

    def score(
        self,
        count: int,
        read: Callable[[int], Fields],
        shape_of: Callable[[int], tuple[int, int]],
        done: Callable[[], None],
        metrics: Sequence[OfRows] = (),
    ) -> dict[int, BatchScore]:
        """Score `count` batches; return their results on the ranks that count the loss.

        `read(number)` gives the fields of a batch of `shape_of(number)` = (B, T). `done` is called
        after each batch, on the ranks that begin the model.
        """
        if not count:
            return {}
        dtype = torch_dtype(self.plan.precision.dtype)
        found: dict[int, BatchScore] = {}

        def run(first: int, batches: int) -> None:
            """Score the batches from `first` on."""
            stages = {
                stage: ScoringStage(
                    part,
                    self.task,
                    self.plan.precision,
                    lambda number: read(first + number),
                    done,
                    metrics,
                    lambda number, fields: self._shared(fields, shape_of(first + number)[1]),
                )
                for stage, part in self.parts.items()
            }

            def shapes(stage: int, number: int) -> tuple[tuple[int, ...], ...]:
                return self._stream_shapes(stage, *shape_of(first + number))

            streams = StreamShapes(shapes, dtype, self.device)

            def own_shape(number: int) -> tuple[int, int]:
                rows, length = shape_of(first + number)
                return rows, self._own_length(length)

            entered = self._entered(stages, own_shape, self._scored_rows)
            self.pipeline.run(forward_only(self.plan.schedule, batches), entered, streams)
            for stage in stages.values():
                found.update({first + number: score for number, score in stage.scores.items()})

        # Architectures may behave otherwise in training, such as by dropout.
        for part in self.parts.values():
            part.eval()
        with uncompiled() if self.compiled else nullcontext(), self._reading():
            # A rank drains its sends at the end of a run. Without rounds, the streams of all
            # batches would wait at a first rank that is faster than the others.
            at_once = scored_ahead(self.plan.schedule.ranks) or count
            for first in range(0, count, at_once):
                run(first, min(at_once, count - first))
        for part in self.parts.values():
            part.train()
        if not counts_loss(self.mesh.coordinates):
            # Another rank has the same results and counts them.
            return {}
        return found

    def _shared(self, fields: Fields, length: int) -> Fields:
        """Begin a batch of whole sequences of `length`; return the fields that this rank reads."""
        if self._share is None:
            return fields
        self._share.begin(length)
        return {**self._share.deal(fields, length), **self._share.placed(length)}

    def _stream_shapes(self, stage: int, rows: int, length: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of this rank's streams into a stage, of sequences of `length`."""
        ahead = self.spec.streams_ahead(self.plan.parts[stage].first, length)
        own = tuple((self._own_length(length), width) for length, width in ahead)
        if self.tensor is None:
            return tuple((rows, *stream) for stream in own)
        return tuple((*self.tensor.own_shape(rows, length), width) for length, width in own)

    def _own_length(self, length: int) -> int:
        """Return how many of the positions of a sequence this rank computes."""
        return length if self._share is None else self._share.length(length)

    def filled(self) -> None:
        """Pass on weights that were set from outside. Every rank calls it."""
        self.gradients.updated()
        self.frozen.filled()

    def close(self) -> None:
        """Free shared memory and communicators."""
        if self._teacher is not None:
            self._teacher.close()
        self.frozen.close()
        self.pipeline.close()
        if self._share:
            self._share.close()
        for tied in self._tied:
            tied.close()
        if self.tensor is not None:
            self.tensor.close()
        self.gradients.close()
        if self.experts is not None:
            self.experts.close()


def _build(spec: ModelSpec, part: Part, device: torch.device, on_host: bool) -> PartModule:
    """Build a part without values for `device`. With `on_host` its weights are in host memory, of
    which no page is touched: gradients move them one by one.
    """
    model = build_without_values(spec, torch.device("cpu") if on_host else device, part)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model


def _length(fields: Fields) -> int:
    """Return the tokens of the sequences in `fields`; 0 where there are none."""
    return next((field.shape[1] for field in fields.values() if field.dim() > 1), 0)


def _followers(spec: ModelSpec) -> dict[str, list[str]]:
    """Group the tied weights by the weight that is saved."""
    groups: dict[str, list[str]] = {}
    for follower, leader in spec.tied_weights.items():
        groups.setdefault(leader, []).append(follower)
    return groups
