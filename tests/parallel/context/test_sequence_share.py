"""A rank's share of sequences: fields, positions, and scores of rows of any length."""

import pytest
import torch
from mpi4py import MPI

from mpillm.comm.mesh import Mesh
from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.attention import Pattern
from mpillm.parallel.context.sequence_share import SequenceShare
from mpillm.parallel.context.zigzag import own_positions
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.parallel.step_plan import plan_step
from mpillm.parallel.tensor.weight_cuts import own_key_value_heads
from mpillm.tasks.causal_lm import CausalLM
from tests.parallel.context.context_inputs import axis_of, largest_error
from tests.parallel.score_totals import totals

MODEL = DecoderConfig(layers=2, width=16, heads=4, context=24, vocab_size=30)
RING = ParallelSettings(context_kind="ring", debug=True)


def test_fields_of_positions_are_dealt_and_others_stay(comm):
    axis, device = axis_of(comm), torch.device("cpu")
    share = SequenceShare(axis, [MODEL.build()], 2, torch.float32, device, RING)
    ids = torch.arange(48).view(2, 24)
    fields = {
        "ids": ids,
        "pairs": ids[..., None].expand(-1, -1, 3),
        "documents": ids,
        "dropout_keys": torch.arange(2),
        "other": torch.zeros(2, 23),
    }
    own = torch.from_numpy(own_positions(comm.rank, comm.size, 24))
    found = share.deal(fields)
    assert torch.equal(found["ids"], ids[:, own])
    assert torch.equal(found["pairs"], fields["pairs"][:, own])
    for name in ("documents", "dropout_keys", "other"):
        assert found[name] is fields[name]
    assert torch.equal(share.placed()["positions"], own)
    assert share.length(24) == len(own)
    share.close()


@pytest.mark.parametrize("kind", ["ring", "auto"])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_scores_of_rows_of_any_length_are_those_of_one_process(comm, kind, pipeline):
    if comm.size % pipeline:
        pytest.skip("needs a rank for each stage")
    context = comm.size // pipeline
    lengths, generator = (24, 7, 2, 1), torch.Generator().manual_seed(3)
    rows = [torch.randint(30, (2, length + 1), generator=generator) for length in lengths]

    def scored(ranks, sizes):
        settings = ParallelSettings(pipeline=sizes["pipeline"], context_kind=kind)
        mesh = Mesh(ranks, sizes)
        model = ShardedModel(
            MODEL, CausalLM(), 1, mesh, plan_step(MODEL, settings, 1, 2), settings, scored_rows=2
        )
        found = model.score(
            len(rows),
            lambda number: {"ids": rows[number][:, :-1], "targets": rows[number][:, 1:]},
            lambda number: (2, lengths[number]),
            lambda: None,
        )
        model.close()
        parts = ranks.allgather({n: totals(score) for n, score in found.items()})
        mesh.free()
        return [
            [sum(part[number][i] for part in parts if part) for i in (0, 1)]
            for number in range(len(rows))
        ]

    sizes = {"data": 1, "pipeline": pipeline} | ({"context": context} if context > 1 else {})
    found, wanted = scored(comm, sizes), scored(MPI.COMM_SELF, {"data": 1, "pipeline": 1})
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("heads", [(12, 3, 2), (12, 4, 3), (8, 2, 4)])
def test_the_rows_of_a_ring_hold_the_heads_that_a_tensor_rank_attends_with(comm, heads):
    """A rank may name a head of keys and values once for each head of queries."""
    queries, kv_heads, tensor = heads
    model = MODEL.replace(width=4 * queries, heads=queries, kv_heads=kv_heads)
    width, length = model.head_features, 4 * comm.size
    model = model.replace(context=length)
    for rank in range(tensor):
        share = SequenceShare(
            axis_of(comm), [model.build()], 2, torch.float32, torch.device("cpu"), RING, tensor
        )
        own = len(own_key_value_heads(queries, kv_heads, tensor, rank))
        shape = (2, length, queries // tensor, own, width)
        assert largest_error(share.attention.attend, comm, shape, Pattern()) <= 1e-6
        share.close()


def test_masks_of_one_length_are_kept(comm):
    share = SequenceShare(
        axis_of(comm), [MODEL.build()], 1, torch.float32, torch.device("cpu"), RING
    )
    ring = share.attention
    for length in (24, 7, 24, 3):
        ring.length = length
        largest_error(ring.attend, comm, (1, length, 4, 4, 4), Pattern())
        # A step with each rank.
        assert len(ring._plain) == comm.size
    share.close()
