"""The gathers of a step, counted from its schedule and at work."""

import pytest
from mpi4py import MPI

from mpillm.models.decoder import SHAPES
from mpillm.parallel.data.gathered_unit import GatheredUnit
from mpillm.parallel.data.zero import ShardStep
from mpillm.parallel.pipeline.actions import Action, PipelineSchedule
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import StepPlan, plan_step, traffic_bytes
from mpillm.plan.gather_count import gathers_a_step
from tests.parallel.data.test_gathered_weights import ROWS, SPEC, Trained, run_stage

SMALL = SHAPES["small"].replace(vocab_size=2048)


@pytest.mark.parametrize(
    "order", ["F0 B0 F1 B1 F2 B2", "F0 F1 B0 F2 B1 B2", "F0 I0 W0 F1 I1 W1", "F0 I0 F1 W0 I1 W1"]
)
def test_the_bytes_are_those_that_ranks_send(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    splits, spec = "W" in order, SPEC.replace(tied=False)
    trained, start = Trained(comm, step=ShardStep(splits=splits), spec=spec), GatheredUnit.start
    sent = 0

    def counted(unit: GatheredUnit, stretch: int = 0) -> None:
        nonlocal sent
        # In an all-gather each rank passes on the blocks of all but one.
        sent += 4 * unit._stretches[stretch].own.numel() * (comm.size - 1)
        start(unit, stretch)

    monkeypatch.setattr(GatheredUnit, "start", counted)
    run_stage(trained, order)
    row = tuple(Action(0, each[0], int(each[1:])) for each in order.split())  # type: ignore[arg-type]
    count = 1 + max(action.microbatch for action in row)
    schedule = PipelineSchedule("test", (row,), 1, count)
    plan = StepPlan(schedule, (spec.whole,), ROWS, ROWS // count)
    sizes, settings = {"data": comm.size, "pipeline": 1}, ParallelSettings(zero=3)
    without, found = (
        traffic_bytes(sizes, spec, ROWS, 1, settings=settings, gathers=gathers)["data"]
        for gathers in (0, gathers_a_step(spec, plan))
    )
    # A block of a rank is a whole number of lines.
    assert found - without <= sent <= 1.03 * (found - without)
    trained.close()


@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_pass_begins_with_the_block_that_is_there(microbatches: int) -> None:
    plan = plan_step(SMALL, ParallelSettings(), 1, microbatches, 1)
    outside, block = SMALL.block_parameters_of(SMALL.whole)
    passes = 1 + 2 * microbatches * (SMALL.layers - 1)
    expected = (outside + passes * block) / SMALL.parameters
    assert gathers_a_step(SMALL, plan) == pytest.approx(expected)


def test_a_pipeline_gathers_again_after_each_forward_pass_ahead() -> None:
    one, split = (
        plan_step(SMALL, ParallelSettings(pipeline=2, schedule=name), 1, 8, 1)
        for name in ("1f1b", "zb-h1")
    )
    _, block = SMALL.block_parameters_of(SMALL.whole)
    outside = [SMALL.block_parameters_of(part)[0] for part in one.parts]
    held = sum(SMALL.parameters_of(part) for part in one.parts)
    each = SMALL.layers // 2
    # The first stage is a microbatch ahead of the second: two forward passes follow each other, and
    # two backward passes.
    passes = (2 * 8 * (each - 1) + 3) + (2 * 8 * (each - 1) + 1)
    assert gathers_a_step(SMALL, one) == pytest.approx((sum(outside) + passes * block) / held)
    assert gathers_a_step(SMALL, split) > 1.4 * gathers_a_step(SMALL, one)
