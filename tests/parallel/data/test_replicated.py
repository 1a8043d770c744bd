"""Data parallelism, compared with one process that sees the whole batch."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from mpillm.comm import communicator
from mpillm.comm.gpu.device_buffer import DeviceBuffer
from mpillm.comm.mesh import Mesh
from mpillm.errors import CommError
from mpillm.parallel.data.buckets import lay
from mpillm.parallel.data.replicated import ReplicatedGradients
from mpillm.parallel.data.same_weights import (
    broadcast_parameters,
    check_same,
    first_difference,
)
from mpillm.parallel.grad_norm import clip_gradients_, gradient_norm
from mpillm.parallel.settings import ParallelSettings
from mpillm.train.optimizers.adamw import AdamWSettings

specification = importlib.util.spec_from_file_location(
    "simulated", Path(__file__).parents[2] / "comm/gpu/simulated_cupy.py"
)
simulated = importlib.util.module_from_spec(specification)
specification.loader.exec_module(simulated)

WIDTH, ROWS = 24, 5
OVERLAPPED = ParallelSettings(overlap="during", bucket_bytes=4096)
SETTINGS = [
    ParallelSettings(),
    ParallelSettings(allreduce="shared", bucket_bytes=4096),
    ParallelSettings(allreduce="ring", bucket_bytes=4096),
    ParallelSettings(allreduce="mpi", overlap="after", bucket_bytes=1),
    OVERLAPPED,
    ParallelSettings(overlap="during", bucket_bytes=1),
    ParallelSettings(allreduce="ring", overlap="during", bucket_bytes=4096),
    ParallelSettings(allreduce="mpi", overlap="during", bucket_bytes=4096),
    ParallelSettings(allreduce="rabenseifner", overlap="during", debug=True),
    ParallelSettings(allreduce="two-level"),
]


class Net(nn.Module):
    """Tied weights, a scalar, a frozen parameter and one that no forward pass uses."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 70), nn.GELU(), nn.Linear(70, WIDTH))
        self.unused = nn.Linear(WIDTH, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.layers(self.embedding(ids)) * self.scale * self.frozen)


@pytest.fixture
def axis(comm):
    mesh = Mesh(comm, {"data": comm.size})
    yield mesh.axis("data")
    mesh.free()


@pytest.fixture
def net():
    torch.manual_seed(7)
    return Net()


def bucketed(net, axis, settings):
    """Gradients in buckets, which one rank alone has for a fixed order only."""
    return ReplicatedGradients([net.parameters()], axis, settings, fixed_order=axis.size == 1)


def clip(gradients, axis, max_norm):
    return clip_gradients_(gradients, axis.comm, (axis.rank, axis.size), max_norm)


def test_measuring_changes_no_gradient_of_mixed_dtypes(comm):
    """The float32 gradients are laid into their bucket, those of bfloat16 are added to it."""
    mesh = Mesh(comm, {"data": comm.size})
    parts = [nn.Linear(4, 4), nn.Linear(4, 4).to(torch.bfloat16)]
    weights = [weight for part in parts for weight in part.parameters()]
    gradients = ReplicatedGradients([weights], mesh.axis("data"), ParallelSettings())
    found = []
    for small in (None, lambda pairs: [None for _ in pairs]):
        gradients.begin(small)
        gradients.last_microbatch()
        sum(part(torch.ones(2, 4, dtype=part.weight.dtype)).sum() for part in parts).backward()
        gradients.microbatch_ended(0)
        gradients.finish()
        found.append([gradients.gradient_of(weight).clone() for weight in weights])
    assert all(torch.equal(plain, measured) for plain, measured in zip(*found, strict=True))
    assert found[0][0].unique().tolist() == [2.0 * comm.size]
    gradients.close()
    mesh.free()


def batch(rows):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(50, (rows, 9), generator=generator)


def loss(net, ids):
    return nn.functional.cross_entropy(
        net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )


def whole_batch_gradients(net, ids):
    """Compute the reference: one process, one backward pass, plain torch."""
    reference = copy.deepcopy(net)
    (loss(reference, ids) / ids[:, 1:].numel()).backward()
    return {name: parameter.grad for name, parameter in reference.named_parameters()}


def run_step(buckets, net, ids, axis, microbatch=2):
    """Run a step over this rank's share of `ids`; microbatches need not divide it."""
    rows = len(ids) // axis.size
    first = axis.rank * rows
    buckets.begin()
    for start in range(0, rows, microbatch):
        if start + microbatch >= rows:
            buckets.last_microbatch()
        part = ids[first + start : first + min(start + microbatch, rows)]
        (loss(net, part) / ids[:, 1:].numel()).backward()
    buckets.finish()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_are_the_whole_batch_s(axis, net, settings):
    ids = batch(ROWS * axis.size)
    expected = whole_batch_gradients(net, ids)
    buckets = ReplicatedGradients([net.parameters()], axis, settings)
    for _ in range(2):  # the second step finds what the first left
        run_step(buckets, net, ids, axis)
        for name, parameter in net.named_parameters():
            if expected[name] is None:
                assert parameter.grad is None or not parameter.grad.any(), name
            else:
                torch.testing.assert_close(
                    parameter.grad, expected[name], rtol=1e-4, atol=1e-7, msg=name
                )


def test_overlapped_equals_after(axis, net):
    ids = batch(ROWS * axis.size)
    after, during = copy.deepcopy(net), net
    for model, overlap in ((after, "after"), (during, "during")):
        settings = ParallelSettings(allreduce="mpi", overlap=overlap, bucket_bytes=2048)
        run_step(ReplicatedGradients([model.parameters()], axis, settings), model, ids, axis)
    for one, other in zip(after.parameters(), during.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-8)


def test_ranks_agree_bitwise(axis, net):
    for settings in SETTINGS:
        model = copy.deepcopy(net)
        buckets = ReplicatedGradients([model.parameters()], axis, settings)
        run_step(buckets, model, batch(ROWS * axis.size), axis)
        check_same([bucket.flat for bucket in buckets.buckets], axis)


def test_overlap_where_ranks_use_different_parameters(axis, net):
    """Buckets complete in another order, or never, on another rank; MPI must see one order."""
    buckets = ReplicatedGradients(
        [net.parameters()], axis, ParallelSettings(overlap="during", bucket_bytes=1)
    )
    rows = torch.ones(2, WIDTH)
    for _ in range(2):
        buckets.begin()
        buckets.last_microbatch()
        (net.unused(rows) if axis.rank % 2 else net.layers(rows)).sum().backward()
        buckets.finish()
    odd = axis.size // 2
    assert (net.unused.bias.grad == 2 * odd).all()
    assert (net.layers[2].bias.grad == 2 * (axis.size - odd)).all()


def test_nothing_overlaps_where_one_thread_alone_may_call_mpi(axis, net, monkeypatch):
    monkeypatch.setattr(MPI, "Query_thread", lambda: MPI.THREAD_SERIALIZED)
    sync = ReplicatedGradients([net.parameters()], axis, ParallelSettings())
    assert not sync._wants_overlap("auto", on_gpu=True)
    assert sync._wants_overlap("during", on_gpu=False)
    monkeypatch.undo()
    assert sync._wants_overlap("auto", on_gpu=True)
    sync.close()


def test_buckets_hold_each_parameter_once_in_reverse(axis, net):
    buckets = bucketed(net, axis, ParallelSettings(bucket_bytes=8192)).buckets
    held = [parameter for bucket in buckets for parameter in bucket.parameters]
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    assert [id(p) for p in held] == [id(p) for p in reversed(trained)]
    assert net.head.weight is net.embedding.weight
    assert net.frozen.grad is None
    for bucket in buckets:
        for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
            lay(parameter, view)
        first, stop = bucket.flat.data_ptr(), bucket.flat.data_ptr() + bucket.flat.nbytes
        assert bucket.flat.nbytes <= 8192 or len(bucket.parameters) == 1
        for parameter in bucket.parameters:
            assert first <= parameter.grad.data_ptr() < stop
            assert (parameter.grad.data_ptr() - first) % 64 == 0


def test_mixed_types(axis):
    for overlap, algorithm in (("after", "auto"), ("during", "auto"), ("after", "mpi")):
        torch.manual_seed(1)
        pair = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6).bfloat16(), nn.Linear(6, 6)])
        buckets = ReplicatedGradients(
            [pair.parameters()], axis, ParallelSettings(overlap=overlap, allreduce=algorithm)
        )
        # The sums of a lower dtype are float32, too.
        assert [bucket.flat.dtype for bucket in buckets.buckets] == [torch.float32] * 2
        assert [bucket.adds for bucket in buckets.buckets] == [False, True]
        buckets.begin()
        buckets.last_microbatch()
        sum(
            layer(torch.full((1, 6), axis.rank + 1.0, dtype=layer.weight.dtype)).sum()
            for layer in pair
        ).backward()
        buckets.finish()
        total = float(sum(range(1, axis.size + 1)))
        assert all((buckets.gradient_of(layer.weight) == total).all() for layer in pair)
        assert all((buckets.gradient_of(layer.bias) == axis.size).all() for layer in pair)


@pytest.mark.parametrize("settings", SETTINGS[:5])
@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_a_lower_dtype(axis, settings, reduce_dtype):
    torch.manual_seed(1)
    layer = nn.Linear(40, 40).bfloat16()
    unused = nn.Linear(3, 3).bfloat16()
    sync = ReplicatedGradients(
        [[*layer.parameters(), *unused.parameters()]],
        axis,
        settings,
        reduce_dtype=reduce_dtype,
    )
    values = {weight: weight.data.float() + 1e-4 for weight in layer.parameters()}
    masters = sync.optimizer_weights(dict(layer.named_parameters()), values)
    for _ in range(2):
        sync.begin()
        for microbatch in range(3):
            if microbatch == 2:
                sync.last_microbatch()
            # 1/256 of the sum: lost where a sum is kept in bfloat16.
            rows = torch.full((1, 40), 256.0 if microbatch == 0 else 1.0, dtype=torch.bfloat16)
            layer(rows).sum().backward()
            sync.microbatch_ended(0)
        sync.finish()
        grad = masters["weight"].grad
        assert grad.dtype == torch.float32
        torch.testing.assert_close(
            grad, torch.full_like(grad, 258.0 * axis.size), rtol=5e-3, atol=0
        )
        if reduce_dtype == torch.float32:
            assert (grad == 258.0 * axis.size).all()
        assert layer.weight.grad is None
        assert not sync.gradient_of(unused.weight).any()
    assert masters["weight"].dtype == torch.float32
    assert masters["weight"].equal(values[layer.weight])
    with torch.no_grad():
        masters["weight"].add_(1.0)
    sync.updated()
    assert layer.weight.equal(masters["weight"].bfloat16())
    sync.close()


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clip(axis, net, max_norm):
    buckets = ReplicatedGradients([net.parameters()], axis, ParallelSettings(bucket_bytes=4096))
    run_step(buckets, net, batch(ROWS * axis.size), axis)
    for bucket in buckets.buckets:
        bucket.flat.mul_(100)
    plain = copy.deepcopy(net)
    for copied, parameter in zip(plain.parameters(), net.parameters(), strict=True):
        copied.grad = None if parameter.grad is None else parameter.grad.clone()
    expected = nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
    assert clip(buckets, axis, max_norm) == pytest.approx(float(expected), rel=1e-5)
    assert gradient_norm(buckets, axis.comm, (axis.rank, axis.size)) == pytest.approx(
        min(float(expected), max_norm), rel=1e-5
    )
    for copied, parameter in zip(plain.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, copied.grad, rtol=1e-4, atol=1e-7)


def test_not_a_number_is_returned_not_spread(axis, net):
    buckets = bucketed(net, axis, ParallelSettings())
    buckets.buckets[0].flat[0], buckets.buckets[0].flat[1] = float("inf"), 2.0
    assert clip(buckets, axis, 1.0) == float("inf")
    assert buckets.buckets[0].flat[1] == 2.0


@pytest.mark.parametrize("settings", [ParallelSettings(), OVERLAPPED], ids=str)
def test_elements_are_clamped_before_the_norm_is_clipped(axis, net, settings):
    ids = batch(ROWS * axis.size)
    whole = whole_batch_gradients(net, ids)
    found = [gradient for gradient in whole.values() if gradient is not None]
    norm = float(torch.cat([gradient.flatten() for gradient in found]).norm())
    limit = 0.01
    assert any(gradient.abs().max() > limit for gradient in found)
    left = torch.cat([gradient.clamp(-limit, limit).flatten() for gradient in found]).norm()
    buckets = bucketed(net, axis, settings)
    for max_norm in (torch.inf, 0.5 * float(left), 0.99 * norm):
        run_step(buckets, net, ids, axis)
        replica = (axis.rank, axis.size)
        # The norm of the sum itself, whatever the clipping leaves of it.
        had = clip_gradients_(buckets, axis.comm, replica, max_norm, max_value=limit)
        assert had == pytest.approx(norm, rel=1e-5)
        factor = min(1.0, max_norm / float(left))
        for name, parameter in net.named_parameters():
            if whole[name] is not None:
                expected = whole[name].clamp(-limit, limit) * factor
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)
    buckets.close()


def test_what_is_not_finite_is_reported_and_not_clamped(axis, net):
    ids = batch(ROWS * axis.size)
    buckets = bucketed(net, axis, ParallelSettings())
    run_step(buckets, net, ids, axis)
    net.scale.grad.fill_(torch.inf)
    norm = clip_gradients_(buckets, axis.comm, (axis.rank, axis.size), 1.0, max_value=0.1)
    assert norm == torch.inf
    assert net.scale.grad == torch.inf
    buckets.close()


@pytest.mark.parametrize("to_none", [True, False])
def test_an_optimizer_may_clear_the_gradients(axis, net, to_none):
    ids = batch(axis.size)
    buckets = ReplicatedGradients([net.parameters()], axis, ParallelSettings())
    run_step(buckets, net, ids, axis)
    expected = [bucket.flat.clone() for bucket in buckets.buckets]
    torch.optim.SGD(net.parameters()).zero_grad(set_to_none=to_none)
    (loss(net, ids[axis.rank : axis.rank + 1]) / ids[:, 1:].numel()).backward()
    buckets.finish()
    for bucket, flat in zip(buckets.buckets, expected, strict=True):
        torch.testing.assert_close(bucket.flat, flat, rtol=1e-5, atol=1e-8)


def test_another_model_on_one_rank(axis):
    if axis.size == 1:
        pytest.skip("needs another rank")
    width = 5 if axis.rank == 0 else 6
    with pytest.raises(CommError, match=r"the same parameters: rank \d has buckets"):
        ReplicatedGradients([nn.Linear(width, 40).parameters()], axis, ParallelSettings())


def test_check_same_names_the_rank(axis, net):
    check_same(net.parameters(), axis)
    if axis.size == 1:
        return
    odd = axis.size - 1
    if axis.rank == odd:
        with torch.no_grad():
            net.layers[2].bias[1] += 1e-7
    with pytest.raises(
        CommError, match=f"rank {odd} of {axis.size} differs, first in parameter 6 of"
    ):
        check_same(net.parameters(), axis)
    broadcast_parameters(net.parameters(), axis)
    check_same(net.parameters(), axis)


def test_first_difference():
    assert first_difference([["a", "b"], ["a", "c"], ["a", "c"]]) == (1, [0])
    assert first_difference([["a", "b"], ["a", "c"]]) == (1, [1])
    assert first_difference([["a"], ["a", "b"], ["a"]]) == (1, [1])


def test_broadcast_from_another_root(axis):
    root = axis.size - 1
    tensors = [
        torch.full((3, 2), float(axis.rank)),
        torch.full((5,), axis.rank, dtype=torch.bfloat16),
        torch.zeros(0),
    ]
    broadcast_parameters(tensors, axis, root)
    assert all((tensor == root).all() for tensor in tensors)


# ---- on GPUs, simulated and real ----


@pytest.fixture
def taken_for_a_gpu_s(monkeypatch):
    """Take tensors of the host for a GPU's, by a simulated CuPy whose streams run late."""
    with simulated.pretended(seed=3) as (cupy, machine):

        def buffer_of(tensor, writable=True):
            flat, element = tensor.detach().view(-1), str(tensor.dtype).removeprefix("torch.")
            memory = flat.view(torch.int16) if element == "bfloat16" else flat
            raw = memory.numpy().view(np.uint16 if element == "bfloat16" else element)
            return DeviceBuffer(
                element,
                simulated.array_of(raw),
                raw.size,
                raw.ctypes.data,
                0,
                lambda: machine.now().ptr,
                cupy,
            )

        def wait_all(self):
            self.in_flight.wait_all()
            # On a GPU the later work of torch waits in its stream; here torch works at once.
            for stream in list(machine.streams.values()):
                stream.synchronize()

        monkeypatch.setattr(communicator, "is_on_device", lambda a: isinstance(a, torch.Tensor))
        monkeypatch.setattr(communicator, "as_device_buffer", buffer_of)
        monkeypatch.setattr(communicator.Communicator, "wait_all", wait_all)
        yield machine


@pytest.mark.parametrize("overlap", ["after", "during"])
@pytest.mark.parametrize("algorithm", ["auto", "ring", "two-level"])
def test_buckets_take_the_ways_of_gpus(axis, net, taken_for_a_gpu_s, algorithm, overlap):
    ids = batch(ROWS * axis.size)
    expected = whole_batch_gradients(net, ids)
    settings = ParallelSettings(allreduce=algorithm, overlap=overlap, bucket_bytes=4096)
    sync = ReplicatedGradients([net.parameters()], axis, settings)
    for _ in range(2):
        run_step(sync, net, ids, axis)
        for name, parameter in net.named_parameters():
            if expected[name] is not None:
                torch.testing.assert_close(
                    parameter.grad, expected[name], rtol=1e-4, atol=1e-7, msg=name
                )
    if axis.size > 1:
        # Without a profile `auto` takes NCCL; a name of the CPU's is staged by that algorithm.
        chosen = {bucket.sum.algorithm for bucket in sync.buckets}
        assert chosen == {"nccl" if algorithm == "auto" else algorithm}
        copies = [stream for stream in taken_for_a_gpu_s.streams.values() if stream.ptr]
        assert bool(copies) == (algorithm != "auto"), "staging has streams of its own"
    sync.close()


@pytest.mark.gpu
@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_of_a_gpu_are_the_whole_batch_s(axis, net, gpu, settings, reduce_dtype):
    ids = batch(ROWS * axis.size)
    expected = whole_batch_gradients(net, ids)
    net.to(gpu)
    sync = ReplicatedGradients([net.parameters()], axis, settings, reduce_dtype=reduce_dtype)
    lower = axis.size > 1 and reduce_dtype == torch.bfloat16
    tolerance = {"rtol": 0.05, "atol": 1e-3} if lower else {"rtol": 1e-4, "atol": 1e-6}
    for _ in range(3):
        run_step(sync, net, ids.to(gpu), axis)
        for name, parameter in net.named_parameters():
            if expected[name] is not None:
                assert parameter.grad.device == gpu
                torch.testing.assert_close(
                    parameter.grad.cpu(), expected[name], msg=name, **tolerance
                )
    check_same([bucket.flat for bucket in sync.buckets], axis)
    sync.close()


@pytest.mark.gpu
def test_sums_overlap_with_a_slow_backward_pass_of_a_gpu(axis, gpu):
    """A sum that started too early, or a read that did not wait, would find other values."""
    layers = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8))).to(gpu)
    for layer in layers:
        nn.init.eye_(layer.weight)
        layer.register_full_backward_hook(lambda *_: torch.cuda._sleep(5_000_000))
    settings = ParallelSettings(overlap="during", bucket_bytes=1 << 20)
    sync = ReplicatedGradients([layers.parameters()], axis, settings)
    rows = torch.full((4, 512), axis.rank + 1.0, device=gpu, requires_grad=True)
    for _ in range(3):
        sync.begin()
        sync.last_microbatch()
        layers(rows).sum().backward()
        sync.finish()
        total = 4.0 * sum(range(1, axis.size + 1))
        assert all((sync.gradient_of(layer.weight) == total).all() for layer in layers)
    sync.close()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_and_norm_of_a_gpu_are_the_cpu_s(axis, gpu, dtype):
    """Weights of each dtype, two steps of AdamW, on the GPU and on the CPU."""
    found = []
    for device in (gpu, torch.device("cpu")):
        torch.manual_seed(7)
        layer = nn.Sequential(nn.Linear(33, 65), nn.Linear(65, 7)).to(device)
        names = dict(layer.named_parameters())
        values = {weight: weight.data for weight in names.values()}
        if dtype == torch.float32:
            values = {}
        for weight in values:
            weight.data = weight.data.to(dtype)
        sync = ReplicatedGradients([layer.parameters()], axis, OVERLAPPED)
        stepped = sync.optimizer_weights(names, values)
        optimizer = AdamWSettings(learning_rate=1e-2).build(stepped.values())
        rows = torch.linspace(-1, 1, 4 * 33).view(4, 33).to(device, dtype)
        norms = []
        for _ in range(2):
            sync.begin()
            sync.last_microbatch()
            layer(rows).square().sum().backward()
            sync.finish()
            norms.append(clip(sync, axis, 1.0))
            optimizer.step()
            sync.updated()
        found.append((norms, {name: weight.detach().cpu() for name, weight in stepped.items()}))
        assert all(weight.dtype == dtype for weight in names.values())
        sync.close()
    (norms, weights), (expected_norms, expected) = found
    lower = dtype == torch.bfloat16
    assert norms == pytest.approx(expected_norms, rel=2e-2 if lower else 1e-4)
    for name, weight in weights.items():
        # The mean: AdamW's first steps are as large for gradients that are all rounding.
        assert float((weight - expected[name]).abs().mean()) < (2e-3 if lower else 2e-5), name
