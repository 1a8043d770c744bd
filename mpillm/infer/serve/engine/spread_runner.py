"""A model whose stages and layers several ranks share, for the steps that rank 0 plans.

The ranks are pipeline × tensor. Rank 0 broadcasts each plan; every rank computes its part of all
rows; the last stage sends what is wanted to rank 0, which draws.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mpillm.comm.failure import on_all
from mpillm.comm.mesh import Mesh
from mpillm.comm.waiting import wait_patiently
from mpillm.infer.serve.engine.row_plan import PlanKind, PlannedRow, RowPlan
from mpillm.infer.serve.engine.scheduler import Wanted
from mpillm.infer.serve.engine.step_runner import StepRunner
from mpillm.machine.node_map import map_nodes
from mpillm.models.decoder import DecoderConfig
from mpillm.models.part_module import build_without_values
from mpillm.models.stacks.decoder_stack import Decoder
from mpillm.parallel.pipeline.partition import partition_blocks
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import mesh_order
from mpillm.parallel.tensor.tensor_parallel import TensorParallel
from mpillm.parallel.tensor.weight_cuts import own_key_value_heads

if TYPE_CHECKING:
    from mpi4py import MPI

Read = Callable[[str], Tensor]
"""Returns a weight of the whole model by its name. Raises CheckpointError."""
# Enough that no schedule of training asks for more: a step here has no microbatches.
ANY_BATCH = 1 << 10
STREAM_TAG, FOUND_TAG = 1, 2


class SpreadRunner:
    """One rank's part. Every rank of `comm` makes it, with the same arguments.

    Then rank 0 calls `run` and `end`, and the others `follow`. Raises LayoutError on all ranks
    where the model cannot be shared like this.
    """

    def __init__(
        self,
        spec: DecoderConfig,
        read: Read,
        comm: "MPI.Intracomm",
        sizes: tuple[int, int],
        pages: int,
        page_tokens: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`sizes`: ranks of the pipeline, and of the tensor axis."""
        pipeline, tensor = sizes
        settings = ParallelSettings(data=1, pipeline=pipeline, tensor=tensor)
        mesh_order(settings, comm.size, spec, ANY_BATCH)
        # A copy of its own: no other message is taken for a plan.
        self._comm: MPI.Intracomm = comm.Dup()
        mesh = Mesh(self._comm, {"pipeline": pipeline, "tensor": tensor}, map_nodes(self._comm))
        self._stages = mesh.axis("pipeline")
        part = partition_blocks(spec, pipeline)[self._stages.rank]
        model = build_without_values(spec, None, part)
        assert isinstance(model, Decoder)
        heads = spec.key_value_heads
        self._tensor = None
        if tensor > 1:
            self._tensor = TensorParallel(mesh.axis("tensor"), settings)
            self._tensor.cut(model)
            rank = mesh.axis("tensor").rank
            own = own_key_value_heads(spec.heads, heads, tensor, rank)
            heads = len(own) if heads % tensor else heads // tensor
        on_all(comm, lambda: _fill(model, read))
        self._local = StepRunner(model.to(dtype).eval(), pages, page_tokens, heads)
        self._width, self._dtype = spec.width, next(model.parameters()).dtype
        self._is_root, self._vocabulary = comm.rank == 0, spec.vocab_size
        last = (pipeline - 1) * tensor
        self._gives, self._given_by = comm.rank == last, last

    def run(self, rows: Sequence[PlannedRow]) -> list[Tensor | None]:
        """Compute the rows on all ranks; see StepRunner.run. Rank 0 calls it."""
        self._tell(RowPlan(PlanKind.STEP, tuple(rows)))
        found = self._compute(rows)
        return found if self._gives else self._receive(rows)

    def end(self) -> None:
        """Let the other ranks leave `follow`. Rank 0 calls it, once."""
        self._tell(RowPlan(PlanKind.END))

    def follow(self) -> None:
        """Compute what rank 0 plans, until it ends. The other ranks call it.

        A rank sleeps between two steps, up to 10 ms where nothing is asked.
        """
        while (plan := self._hear()).kind == PlanKind.STEP:
            found = self._compute(plan.rows)
            if self._gives:
                self._send(found)

    def _tell(self, plan: RowPlan) -> None:
        numbers = plan.encode()
        wait_patiently(self._comm.Ibcast(np.array([len(numbers)], np.int64), 0))
        self._comm.Bcast(numbers, 0)

    def _hear(self) -> RowPlan:
        count = np.empty(1, np.int64)
        wait_patiently(self._comm.Ibcast(count, 0))
        numbers = np.empty(int(count[0]), np.int64)
        self._comm.Bcast(numbers, 0)
        return RowPlan.decode(numbers)

    def _compute(self, rows: Sequence[PlannedRow]) -> list[Tensor | None]:
        count = sum(len(row.tokens) for row in rows)
        own = (count, 1)
        if self._tensor is not None:
            self._tensor.stream.enter(count, 1)
            own = self._tensor.own_shape(count, 1)
        streams: tuple[Tensor, ...] = ()
        if self._stages.rank:
            stream = torch.empty((*own, self._width), dtype=self._dtype)
            self._stages.comm.Recv(_octets(stream), self._stages.rank - 1, STREAM_TAG)
            streams = (stream,)
        [output] = self._local.forward(rows, streams)
        if isinstance(output, Tensor):
            given = _octets(output.contiguous())
            self._stages.comm.Send(given, self._stages.rank + 1, STREAM_TAG)
            return []
        return self._local.found(rows, output)

    def _send(self, found: Sequence[Tensor | None]) -> None:
        for each in found:
            if each is not None:
                self._comm.Send(each.contiguous().numpy(), 0, FOUND_TAG)

    def _receive(self, rows: Sequence[PlannedRow]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for row in rows:
            shape = {
                Wanted.LAST_LOGITS: (1, self._vocabulary),
                Wanted.ALL_LOGITS: (len(row.tokens), self._vocabulary),
                Wanted.STATES: (self._width,),
            }.get(row.wanted)
            found.append(None if shape is None else torch.empty(shape))
            if shape is not None:
                self._comm.Recv(found[-1].numpy(), self._given_by, FOUND_TAG)  # type: ignore[union-attr]
        return found


@torch.no_grad()
def _fill(model: Decoder, read: Read) -> None:
    """Read the rank's pieces of the weights, one weight at a time."""
    for name, weight in model.named_weights():
        values, piece = read(name), model.pieces.get(name)
        weight.copy_(values if piece is None else values[piece.place])


def _octets(tensor: Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """View a tensor as bytes: MPI knows no 16-bit numbers."""
    return tensor.view(torch.uint8).numpy()
