"""The gradient noise scale in each layout, compared with plain backward passes of one process."""

import math

import pytest
import torch
from mpi4py import MPI

from mpillm.comm.mesh import Mesh
from mpillm.errors import LayoutError
from mpillm.models.decoder import DecoderConfig
from mpillm.models.part_module import create
from mpillm.parallel.noise_scale import simple_noise_scale
from mpillm.parallel.pipeline.stage import Batch
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.parallel.step_plan import check_small_batches, plan_step
from mpillm.tasks.causal_lm import CausalLM
from mpillm.tasks.cross_entropy import cross_entropy_sum

ROWS, CONTEXT = 12, 12


def config(tied):
    return DecoderConfig(
        layers=4, width=16, heads=2, context=CONTEXT, vocab_size=40, tied=tied, positions="learned"
    )


def tokens():
    """Rows that share half of their tokens: a gradient in spite of the noise."""
    ids = torch.randint(40, (ROWS, CONTEXT + 1), generator=torch.Generator().manual_seed(9))
    ids[:, ::2] = ids[0, ::2]
    return ids


def sharded(comm, spec, data, microbatch, settings, fixed_order=False):
    mesh = Mesh(comm, {"data": data, "pipeline": comm.size // data})
    plan = plan_step(spec, settings, data, ROWS, microbatch, fixed_order=fixed_order)
    model = ShardedModel(spec, CausalLM(), 1, mesh, plan, settings)
    first = mesh.axis("data").rank * plan.rows
    own = tokens()[first : first + plan.rows]
    pieces = [{"ids": own[a:b, :-1], "targets": own[a:b, 1:]} for a, b in plan.bounds]
    return model, Batch(pieces, ROWS * CONTEXT)


def reference(spec, count):
    """McCandlish et al. 2018, equations A.2 and A.3, over `count` small batches."""
    model, ids = create(spec, 1), tokens()
    weights = [
        weight for name, weight in model.named_weights() if name not in spec.tied_weights.values()
    ]

    def square(rows):
        model.zero_grad()
        (cross_entropy_sum(model(rows[:, :-1]), rows[:, 1:]) / (len(rows) * CONTEXT)).backward()
        return sum(float(weight.grad.double().square().sum()) for weight in weights)

    size = ROWS // count
    small = sum(square(ids[first : first + size]) for first in range(0, ROWS, size)) / count
    big = square(ids)
    gradient = (ROWS * big - size * small) / (ROWS - size)
    variance = (small - big) / (1 / size - 1 / ROWS)
    return variance / gradient


def layouts(ranks):
    """List (data, microbatch, small batches) of each layout of `ranks` ranks."""
    found = [(1, 3, 4)]
    if ranks > 1:
        found.append((ranks, ROWS // ranks, ranks))
    return found + [(2, 3, 2)] * (ranks == 4)


@pytest.mark.parametrize("fixed_order", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_every_layout_gives_the_value_of_plain_backward_passes(comm, tied, fixed_order):
    spec = config(tied)
    for data, microbatch, count in layouts(comm.size):
        expected = reference(spec, count)
        assert expected > 1
        schedule = "1f1b" if fixed_order else "zb-h1"
        settings = ParallelSettings(pipeline=comm.size // data, schedule=schedule)
        model, batch = sharded(comm, spec, data, microbatch, settings, fixed_order)
        for _ in range(2):  # the second step finds what the first left
            found = model.train(batch, measure=True).noise_scale
            assert found == pytest.approx(expected, rel=1e-3), (data, microbatch)
            assert set(comm.allgather(found)) == {found}
        assert model.train(batch).noise_scale is None
        model.close()


def test_a_fixed_order_gives_the_bits_of_one_rank(comm):
    """The same microbatches in a pipeline, and over its data ranks where each has one."""
    spec, count = config(tied=True), 4
    alone, whole = sharded(MPI.COMM_SELF, spec, 1, 3, ParallelSettings(), fixed_order=True)
    expected = alone.train(whole, measure=True).noise_scale
    alone.close()
    for data in [1] + [comm.size] * (comm.size == count):
        settings = ParallelSettings(pipeline=comm.size // data)
        model, batch = sharded(comm, spec, data, 3, settings, fixed_order=True)
        assert model.train(batch, measure=True).noise_scale == expected
        model.close()


@pytest.mark.parametrize("overlap", ["after", "during"])
def test_measuring_changes_no_bit_of_a_gradient(comm, overlap):
    settings = ParallelSettings(overlap=overlap, bucket_bytes=2048)
    model, batch = sharded(comm, config(tied=True), comm.size, 1, settings)
    losses = model.train(batch).losses
    gradients = {name: weight.grad.clone() for name, weight in model.named_weights().items()}
    for _ in range(2):
        assert model.train(batch, measure=True).losses == losses
        for name, weight in model.named_weights().items():
            assert torch.equal(weight.grad, gradients[name]), name
    model.close()


def test_the_estimate_is_free_of_bias():
    """Gradients of a known mean and variance, one a sequence: the ratio of mean estimates."""
    generator = torch.Generator().manual_seed(0)
    mean, deviation, rows, count = 0.3, 2.0, 64, 8
    smalls, wholes = [], []
    for _ in range(2000):
        each = mean + deviation * torch.randn(rows, 5, generator=generator, dtype=torch.float64)
        parts = each.view(count, -1, 5).sum(1) / rows
        smalls.append(float(parts.square().sum()))
        wholes.append(float(parts.sum(0).square().sum()))
    small, whole = math.fsum(smalls) / len(smalls), math.fsum(wholes) / len(wholes)
    expected = deviation**2 / mean**2
    assert simple_noise_scale(small, whole, count, rows) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("small", "whole"), [(1.0, 1e-9), (math.inf, math.inf), (math.nan, 1.0)])
def test_a_gradient_that_is_lost_in_its_noise_has_no_value(small, whole):
    assert simple_noise_scale(small, whole, 4, 8) is None


@pytest.mark.parametrize(
    ("batch", "microbatch", "words"),
    [
        (
            12,
            12,
            r"12 sequences as 1 microbatch.* train\.microbatch to one of 1, 2, 3, 4, 6, or use",
        ),
        (12, 5, r"12 sequences as 3 microbatch\(es\) of 5; set"),
        (1, 1, r"raise train\.batch, or use more data ranks"),
    ],
)
def test_a_step_without_equal_small_batches_is_refused(batch, microbatch, words):
    plan = plan_step(config(tied=True), ParallelSettings(), 1, batch, microbatch)
    with pytest.raises(LayoutError, match=words):
        check_small_batches(plan, 1)
    check_small_batches(plan, 2)
    check_small_batches(plan_step(config(tied=True), ParallelSettings(), 1, 12, 4), 1)
