"""Every schedule over a real pipeline, beside one process that has the whole model."""

import time
from itertools import pairwise

import pytest
import torch

from mpillm.comm.mesh import Mesh
from mpillm.errors import CommError, LayoutError
from mpillm.models.decoder import DecoderConfig
from mpillm.models.encoder import SHAPES, EncoderConfig
from mpillm.models.linear_head import plain_outputs
from mpillm.models.part_module import create
from mpillm.parallel.pipeline import executor
from mpillm.parallel.pipeline.executor import Pipeline
from mpillm.parallel.pipeline.schedule_catalog import SCHEDULES, make_schedule
from mpillm.parallel.pipeline.schedules.forward_only import forward_only
from mpillm.parallel.pipeline.simulate import Costs, simulate
from mpillm.parallel.pipeline.stage import Batch
from mpillm.parallel.pipeline.stream_transport import DeviceTransport, StreamShapes
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.parallel.step_plan import Precision, plan_step
from mpillm.tasks.causal_lm import CausalLM
from mpillm.tasks.cross_entropy import cross_entropy_sum
from tests.parallel.score_totals import totals

ROWS, LAYERS = 8, 8
PLAIN = DecoderConfig(layers=LAYERS, width=16, heads=2, context=12, vocab_size=40)
CONFIGS = [
    PLAIN,
    DecoderConfig(
        layers=LAYERS,
        width=16,
        heads=2,
        context=12,
        vocab_size=40,
        norm="layernorm",
        positions="learned",
        activation="gelu",
        bias=True,
        tied=False,
    ),
]
SWITCHED = [
    # Layers with and without a window, with rotations of their own, and scales about 1.
    DecoderConfig(
        layers=LAYERS,
        width=16,
        heads=2,
        context=12,
        vocab_size=40,
        norm="rmsnorm1p",
        norm_place="sandwich",
        query_key_norm=True,
        scaled_embedding=True,
        window=4,
        full_every=3,
        window_rope_theta=100.0,
        logits_soft_cap=3.0,
    ),
    PLAIN.replace(experts=3, shared_hidden=8, shared_gate=True, hidden=16),
    PLAIN.replace(experts=4, hidden=16, balance_loss=0.5),
    # Post-norm, with summed and normed embeddings, and a tied head with a bias of its own.
    EncoderConfig(
        layers=LAYERS,
        width=16,
        heads=2,
        context=12,
        vocab_size=40,
        token_types=2,
        position_offset=1,
    ),
    # Attention to both sides within a window, and a first block without a norm.
    SHAPES["modernbert-tiny"].replace(
        layers=LAYERS, width=16, heads=2, hidden=24, context=12, vocab_size=40, window=4
    ),
]


def tokens(rows=ROWS):
    return torch.randint(40, (rows, 13), generator=torch.Generator().manual_seed(9))


def fields(rows=ROWS):
    ids = tokens(rows)
    return {
        "ids": ids[:, :-1],
        "targets": ids[:, 1:],
        "documents": documents(rows),
        # Of encoders alone.
        "token_types": ids[:, :-1] % 2,
        "lengths": torch.arange(5, 5 + rows),
    }


def documents(rows=ROWS):
    return torch.tensor([[0] * 5 + [1] * 7]).repeat(rows, 1)


def sharded(
    comm, config, settings, data=1, fixed_order=False, microbatch=1, recompute="none", device="cpu"
):
    """The model over all ranks, and its share of the batch."""
    mesh = Mesh(comm, {"data": data, "pipeline": comm.size // data})
    plan = plan_step(
        config,
        settings,
        data,
        ROWS,
        microbatch,
        precision=Precision(device),
        fixed_order=fixed_order,
        recompute=recompute,
    )
    model = ShardedModel(config, CausalLM(), 1, mesh, plan, settings, scored_rows=3)
    first = mesh.axis("data").rank * plan.rows
    own = {name: field[first : first + plan.rows].to(device) for name, field in fields().items()}
    pieces = [{name: field[a:b] for name, field in own.items()} for a, b in plan.bounds]
    return model, Batch(pieces, ROWS * 12, ROWS)


def reference(config):
    """One process: loss and gradients of the whole batch at once."""
    model = create(config, 1)
    ids = tokens()
    made = model.forward_part(fields(), ())
    (logits,) = plain_outputs(made.outputs)
    loss = cross_entropy_sum(logits, ids[:, 1:]) / (ROWS * 12)
    (loss if made.balance is None else loss + made.balance / ROWS).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    return (
        float(loss.detach()),
        {name: weight.grad for name, weight in model.named_weights()},
        float(norm),
    )


@pytest.mark.parametrize("config", CONFIGS, ids=["tied", "untied"])
@pytest.mark.parametrize("handover", ["shared", "messages"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_are_the_whole_model_s(comm, name, handover, config):
    loss, gradients, norm = reference(config)
    model, batch = sharded(
        comm, config, ParallelSettings(pipeline=comm.size, schedule=name, handover=handover)
    )
    for _ in range(2):  # the second step finds what the first left
        passes = model.train(batch)
        found = comm.allgather(sum(passes.losses))
        assert sum(found) == pytest.approx(loss, rel=1e-5)
        for part, weight in model.named_weights().items():
            torch.testing.assert_close(weight.grad, gradients[part], rtol=1e-4, atol=1e-6, msg=part)
        assert model.clip_(0) == pytest.approx(norm, rel=1e-5)
    assert set().union(*comm.allgather(set(model.named_weights()))) == set(gradients)
    model.close()


@pytest.mark.parametrize(
    "config", SWITCHED, ids=["windows", "experts", "balance", "bert", "modernbert"]
)
@pytest.mark.parametrize("name", ["1f1b", "zb-v"])
def test_gradients_of_other_blocks_are_the_whole_model_s(comm, name, config):
    test_gradients_are_the_whole_model_s(comm, name, "messages", config)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=["tied", "untied"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_of_stages_on_gpus_are_the_whole_model_s(comm, gpu, name, config):
    loss, gradients, norm = reference(config)
    settings = ParallelSettings(pipeline=comm.size, schedule=name)
    model, batch = sharded(comm, config, settings, device=gpu.type)
    for _ in range(3):
        passes = model.train(batch)
        assert sum(comm.allgather(sum(passes.losses))) == pytest.approx(loss, rel=1e-5)
        for part, weight in model.named_weights().items():
            assert weight.grad.device == gpu
            torch.testing.assert_close(
                weight.grad.cpu(), gradients[part], rtol=1e-4, atol=1e-6, msg=part
            )
        assert model.clip_(0) == pytest.approx(norm, rel=1e-4)
        assert all(span.begin <= span.end for span in passes.spans)
        assert all(a.end <= b.begin + 1e-5 for a, b in pairwise(passes.spans))
    assert set().union(*comm.allgather(set(model.named_weights()))) == set(gradients)
    model.close()


def test_clipping_scales_every_stage_alike(comm):
    _, gradients, norm = reference(PLAIN)
    model, batch = sharded(comm, PLAIN, ParallelSettings(pipeline=comm.size))
    model.train(batch)
    assert model.clip_(norm / 3) == pytest.approx(norm, rel=1e-5)
    for name, weight in model.named_weights().items():
        torch.testing.assert_close(weight.grad, gradients[name] / 3, rtol=1e-4, atol=1e-6)
    model.close()


@pytest.mark.parametrize("overlap", ["after", "during"])
@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-v"])
def test_pipelines_side_by_side(comm, name, overlap):
    if comm.size % 2:
        pytest.skip("needs an even number of ranks")
    loss, gradients, norm = reference(PLAIN)
    settings = ParallelSettings(
        pipeline=comm.size // 2, schedule=name, overlap=overlap, bucket_bytes=2048
    )
    model, batch = sharded(comm, PLAIN, settings, data=2)
    for _ in range(2):
        assert sum(comm.allgather(sum(model.train(batch).losses))) == pytest.approx(loss, rel=1e-5)
        for part, weight in model.named_weights().items():
            torch.testing.assert_close(weight.grad, gradients[part], rtol=1e-4, atol=1e-6, msg=part)
        assert model.clip_(0) == pytest.approx(norm, rel=1e-5)
    model.close()


# Every schedule with activations that are kept, and with some that are computed again.
RECOMPUTED = zip(SCHEDULES, ["attention", "full", 2, "full", "attention", "full"], strict=True)


@pytest.mark.parametrize(
    ("name", "recompute"), [*((name, "none") for name in SCHEDULES), *RECOMPUTED]
)
def test_a_fixed_order_gives_the_bits_of_one_rank(comm, name, recompute):
    from mpi4py import MPI

    alone, whole = sharded(MPI.COMM_SELF, PLAIN, ParallelSettings(), fixed_order=True)
    expected = alone.train(whole).losses
    gradients = {part: weight.grad.clone() for part, weight in alone.named_weights().items()}
    layouts = [(1, comm.size)] + ([(2, comm.size // 2)] if comm.size % 2 == 0 else [])
    for data, pipeline in layouts:
        settings = ParallelSettings(pipeline=pipeline, schedule=name)
        model, batch = sharded(comm, PLAIN, settings, data, fixed_order=True, recompute=recompute)
        losses = model.train(batch).losses
        everywhere = [part for part in comm.allgather((model.share[0], losses)) if part[1]]
        assert [loss for _, part in sorted(everywhere) for loss in part] == expected
        for part, weight in model.named_weights().items():
            assert torch.equal(weight.grad, gradients[part]), (data, pipeline, part)
        assert model.clip_(0) == alone.clip_(0)
        model.close()
    alone.close()


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-v"])
def test_scores_are_the_whole_model_s(comm, name):
    model, _ = sharded(comm, PLAIN, ParallelSettings(pipeline=comm.size, schedule=name))
    whole, ids, done = create(PLAIN, 1), tokens(), []
    pieces = [ids[0:3], ids[3:6], ids[6:8], ids[0:1, :6]]
    batches = [{"ids": piece[:, :-1], "targets": piece[:, 1:]} for piece in pieces]
    found = model.score(
        4,
        batches.__getitem__,
        lambda n: (len(pieces[n]), pieces[n].shape[1] - 1),
        lambda: done.append(1),
    )
    merged = {
        number: totals(score)[0] for part in comm.allgather(found) for number, score in part.items()
    }
    with torch.inference_mode():
        expected = {
            n: float(cross_entropy_sum(whole(piece[:, :-1]), piece[:, 1:]))
            for n, piece in enumerate(pieces)
        }
    assert merged == pytest.approx(expected, rel=1e-6)
    assert len(done) == (4 if any(part.begins for part in model.parts.values()) else 0)
    assert model.score(0, batches.__getitem__, lambda n: (1, 1), lambda: None) == {}
    model.close()


class Counting:
    """A stage that computes nothing but counts what it stores."""

    def __init__(self, stages, stage):
        self.last, self.stage = stage == stages - 1, stage
        self.stored = self.peak = 0
        self.seen = []

    def forward(self, microbatch, streams):
        self.seen.append(("F", microbatch, self.value(streams)))
        self.stored += 1
        self.peak = max(self.peak, self.stored)
        return () if self.last else self.made(100.0 * self.stage + microbatch)

    def backward(self, microbatch, gradients, kind="B"):
        self.seen.append((kind, microbatch, self.value(gradients)))
        self.stored -= kind == "B"
        return () if self.stage == 0 else self.made(-100.0 * self.stage - microbatch)

    def backward_input(self, microbatch, gradients):
        return self.backward(microbatch, gradients, "I")

    def made(self, value):
        """Two streams of unequal length: each channel carries both, in this order."""
        return torch.full((3,), value), torch.full((2,), value + 0.5)

    def value(self, streams):
        if not streams:
            return None
        first, second = streams
        assert (second == first[0] + 0.5).all()
        return float(first[0])

    def backward_weight(self, microbatch):
        self.seen.append(("W", microbatch, None))
        self.stored -= 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_streams_of_a_device_pass_through_the_host(comm, monkeypatch, name):
    """The transport of GPUs on CPU tensors: the same copies, in the same order."""
    monkeypatch.setattr(executor, "make_transport", DeviceTransport)
    test_each_stage_is_given_its_neighbour_s_and_stores_what_was_foreseen(comm, name, 8)


@pytest.mark.parametrize("microbatches", [8, 32])
@pytest.mark.parametrize("name", SCHEDULES)
def test_each_stage_is_given_its_neighbour_s_and_stores_what_was_foreseen(comm, name, microbatches):
    axis = Mesh(comm, {"pipeline": comm.size}).axis("pipeline")
    schedule = make_schedule(name, comm.size, microbatches)
    pipeline = Pipeline(axis, schedule, 12)
    stages = {stage: Counting(schedule.stages, stage) for stage in schedule.stages_of(axis.rank)}
    spans = pipeline.run(schedule, stages, StreamShapes(lambda stage, microbatch: ((3,), (2,))))
    assert [span.action for span in spans] == list(schedule.rows[axis.rank])
    assert all(one.end <= other.begin for one, other in pairwise(spans))
    for stage, counting in stages.items():
        for kind, microbatch, value in counting.seen:
            if kind == "F" and stage:
                assert value == 100.0 * (stage - 1) + microbatch
            if kind in "BI" and not counting.last:
                assert value == -100.0 * (stage + 1) - microbatch
    if len(stages) == 1:
        peaks = simulate(schedule, Costs.even(schedule.stages)).peaks
        assert stages[axis.rank].peak == peaks[axis.rank]
    forwards = forward_only(schedule, 5)
    again = {stage: Counting(schedule.stages, stage) for stage in stages}
    pipeline.run(forwards, again, StreamShapes(lambda stage, microbatch: ((3,), (2,))))
    assert all([m for _, m, _ in counting.seen] == list(range(5)) for counting in again.values())
    pipeline.close()


def test_a_stream_of_another_shape_is_refused(comm):
    axis = Mesh(comm, {"pipeline": comm.size}).axis("pipeline")
    schedule = make_schedule("interleaved", comm.size, 4)
    pipeline = Pipeline(axis, schedule, 12)
    stages = {stage: Counting(schedule.stages, stage) for stage in schedule.stages_of(axis.rank)}
    if comm.size == 1:  # elsewhere the other ranks would wait
        with pytest.raises(
            CommError,
            match=r"stage 0 made streams of \(\(3,\), \(2,\)\) .* in 0F0, and the stages agreed on",
        ):
            pipeline.run(schedule, stages, StreamShapes(lambda stage, microbatch: ((2,), (2,))))
        assert pipeline.ways == []
    pipeline.close()


@pytest.mark.parametrize(
    ("settings", "rows", "microbatch", "words"),
    [
        ({"pipeline": 9}, 8, 1, "9 stages need a layer each, and the model has 8"),
        (
            {"pipeline": 2, "schedule": "interleaved", "chunks": 5},
            8,
            1,
            "10 stages need a layer each",
        ),
        (
            {"pipeline": 2},
            10,
            4,
            "train.microbatch = 4 must divide the 10 sequences .* take one of 1, 2, 5, 10",
        ),
        ({"pipeline": 4, "schedule": "zb-v"}, 4, 1, "microbatches"),
        ({"pipeline": 2, "schedule": "1f2b"}, 8, 1, "did you mean 1f1b"),
        ({"pipeline": 2, "stages": (3, 4)}, 8, 1, r"\[3, 4\] shares out 7 layers over 2 stages"),
        ({"pipeline": 2, "schedule": "nowhere.csv"}, 8, 1, "nowhere.csv"),
    ],
)
def test_impossible_layouts_are_refused(settings, rows, microbatch, words):
    with pytest.raises(LayoutError, match=words):
        plan_step(PLAIN, ParallelSettings(**settings), 1, rows, microbatch)


@pytest.mark.parametrize(
    ("data", "rows", "microbatch", "words"),
    [
        (1, 8, 0, "set train.microbatch"),
        (2, 6, 1, "a power of two, not 6"),
        (1, 7, 2, "must divide the 7"),
    ],
)
def test_what_a_fixed_order_cannot_be_had_for(data, rows, microbatch, words):
    with pytest.raises(LayoutError, match=words):
        plan_step(PLAIN, ParallelSettings(), data, data * rows, microbatch, fixed_order=True)


def test_microbatches_are_chosen_where_none_are_asked_for():
    assert plan_step(PLAIN, ParallelSettings(pipeline=2), 1, 64).microbatch == 8
    assert plan_step(PLAIN, ParallelSettings(pipeline=4), 1, 12).microbatch == 1
    assert plan_step(PLAIN, ParallelSettings(), 1, 12).microbatch == 12


SCRIPT = """
import os, signal, sys, torch
from mpillm.comm.mesh import Mesh
from mpillm.comm.failure import fail_together
from mpillm.comm.world import open_world
from mpillm.parallel.pipeline.executor import Pipeline
from mpillm.parallel.pipeline.schedule_catalog import make_schedule
from mpillm.parallel.pipeline.stream_transport import StreamShapes
from tests.parallel.score_totals import totals
comm = open_world()

class Stage:
    def __init__(self, stage, last): self.stage, self.last = stage, last
    def forward(self, microbatch, streams): return () if self.last else (torch.zeros(4),)
    def backward(self, microbatch, gradients):
        if self.stage == 1 and microbatch == 2:
            HARM
        return () if self.stage == 0 else (torch.zeros(4),)

with fail_together(comm):
    axis = Mesh(comm, {"pipeline": comm.size}).axis("pipeline")
    schedule = make_schedule("1f1b", comm.size, 8)
    pipeline = Pipeline(axis, schedule, 16, way=sys.argv[1])
    stages = {axis.rank: Stage(axis.rank, axis.rank == comm.size - 1)}
    pipeline.run(schedule, stages, StreamShapes(lambda stage, m: ((4,),)))
"""


@pytest.mark.parametrize("way", ["shared", "messages"])
def test_a_stage_that_raises_ends_all_with_its_reason(folder, python, way):
    script = folder / "raise.py"
    script.write_text(SCRIPT.replace("HARM", "raise RuntimeError('the gradient is a lie')"))
    done = python(script, way, ranks=3, timeout=60)
    assert done.returncode != 0
    assert "rank 1 of 3" in done.stderr
    assert "RuntimeError: the gradient is a lie" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_killed_rank_is_named_by_who_waits_for_it(folder, python):
    script = folder / "kill.py"
    script.write_text(SCRIPT.replace("HARM", "os.kill(os.getpid(), signal.SIGKILL)"))
    begun = time.monotonic()
    done = python(script, "shared", ranks=3, timeout=60)
    assert done.returncode != 0
    assert time.monotonic() - begun < 50
    # Whoever is faster speaks: the launcher, or a rank that has waited for half a second.
    # MPICH's launcher speaks on stdout.
    said = done.stdout + done.stderr
    assert "rank 1" in said or "signal 9" in said or "Killed" in said
