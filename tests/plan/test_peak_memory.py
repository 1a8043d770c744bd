"""Predictions of memory are sums of what is counted, and need neither torch nor MPI."""

from dataclasses import replace
from typing import Any

import pytest

from mpillm.models.decoder import SHAPES, DecoderConfig
from mpillm.models.spec import ModelSpec, Part
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import Precision, StepPlan, plan_step
from mpillm.plan.held_memory import ALONE, Replicas, held_of
from mpillm.plan.peak_memory import GAP_SHARE, MemoryEstimate, predict_peak

SMALL = SHAPES["small"].replace(vocab_size=2048)
MIB = 1 << 20


class TwoAverages:
    def state_bytes(self, model: ModelSpec, part: Part) -> int:
        return 8 * model.parameters_of(part)


def held_bytes(plan: StepPlan, replicas: Replicas = ALONE) -> int:
    found = held_of(SMALL, plan, TwoAverages(), [SMALL.whole], replicas)
    return found.weights + found.masters + found.optimizer + found.gradients


def planned(model: DecoderConfig = SMALL, batch: int = 8, **settings: Any) -> StepPlan:
    pipeline = settings.pop("pipeline", 1)
    schedule = settings.pop("schedule", "1f1b")
    parallel = ParallelSettings(pipeline=pipeline, schedule=schedule)
    return plan_step(model, parallel, settings.pop("data", 1), batch, **settings)


def predicted(plan: StepPlan, model: DecoderConfig = SMALL, **more: Any) -> MemoryEstimate:
    return predict_peak(model, plan, TwoAverages(), **more)


def test_the_items_add_up_to_the_total_and_are_written_largest_first() -> None:
    estimate = predicted(planned(), process_bytes=300 * MIB)
    assert estimate.total == sum(estimate.items.values())
    assert estimate.process == 300 * MIB
    text = estimate.describe()
    sizes = [int(word.split()[-1].replace(",", "")) for word in text.split("(")[1][:-5].split(", ")]
    assert sizes == sorted(sizes, reverse=True)
    assert text.startswith("about ")
    assert MemoryEstimate(weights=2 * MIB).describe() == "about 2.0 MiB (weights 2 MiB)"


def test_weights_state_and_activations_are_the_models() -> None:
    plan = planned(microbatch=2)
    estimate = predicted(plan)
    assert estimate.weights == estimate.gradients == 4 * SMALL.parameters
    assert estimate.optimizer == 8 * SMALL.parameters
    assert estimate.activations == SMALL.activation_bytes(SMALL.whole, 2)
    assert estimate.outputs == SMALL.output_bytes(2)
    assert estimate.masters == estimate.streams == 0
    step = estimate.activations + estimate.outputs + estimate.recomputed
    assert estimate.gaps == int(GAP_SHARE * step)


def test_gradients_of_one_microbatch_take_the_place_of_its_activations() -> None:
    assert predicted(planned()).gradients == 0
    few = planned(batch=1, recompute="full")
    wide = SMALL.replace(width=2048, heads=16, vocab_size=60_000, context=16)
    step = wide.recompute_bytes(wide.whole, 1, 4, "full")[0]
    assert predicted(few, wide).gradients > 0
    assert predicted(few, wide).gradients < 4 * wide.parameters - step


def test_lower_dtypes_have_masters_and_buckets_in_float32() -> None:
    plan = replace(planned(), precision=Precision(dtype="bfloat16"))
    estimate = predicted(plan)
    assert estimate.weights == 2 * SMALL.parameters
    assert estimate.masters == estimate.gradients == 4 * SMALL.parameters
    assert held_bytes(plan) == 18 * SMALL.parameters
    assert held_bytes(planned(), Replicas(2)) == 16 * SMALL.parameters


def test_replicas_share_the_rows_of_a_node_and_lower_sums_take_a_copy() -> None:
    plan, count = planned(data=2, microbatch=2), SMALL.parameters
    assert predicted(plan, replicas=Replicas(2, 2)).gradients == 6 * count
    assert predicted(plan, replicas=Replicas(2)).gradients == 4 * count
    assert predicted(plan, replicas=Replicas(4, 4)).gradients == 7 * count
    lower = replace(plan, precision=Precision(reduce_dtype="bfloat16"))
    assert predicted(lower, replicas=Replicas(2)).gradients == 6 * count
    fixed = planned(microbatch=2, fixed_order=True)
    assert predicted(fixed).gradients == 4 * count * (1 + 3)  # four microbatches: 3 bits


def test_a_pipeline_holds_the_activations_of_its_schedule_and_its_streams() -> None:
    plan = planned(batch=8, microbatch=1, pipeline=2)
    estimate = predicted(plan)
    first = plan.parts[0]
    assert plan.timeline.peaks == (2, 1)
    # The first rank needs most: two microbatches in flight.
    assert estimate.activations == 2 * SMALL.activation_bytes(first, 1)
    stream = 4 * SMALL.context * SMALL.width
    # Forward: two slots, one send; backward: two slots, two receives.
    assert estimate.streams == stream * (2 + 1 + 2 + 2)
    # A slot is as large as a stream of the evaluation. The last rank computes its logits.
    last = predicted(plan, scored_rows=8)
    assert last.streams == stream * (2 * 8 + 2 + 2 + 1)
    deeper = predicted(planned(batch=8, microbatch=1, pipeline=2, schedule="gpipe"))
    assert deeper.activations == 8 * SMALL.activation_bytes(plan.parts[1], 1)


def test_a_split_backward_pass_undoes_recomputation_between_its_halves() -> None:
    split = planned(batch=8, microbatch=1, pipeline=2, schedule="zb-h1", recompute="full")
    assert max(split.timeline.halves) >= 1
    whole = replace(split, schedule=planned(microbatch=1, pipeline=2).schedule)
    assert whole.timeline.halves == (0, 0)
    del whole.__dict__["timeline"]
    assert predicted(split).activations > predicted(whole).activations


def test_recomputing_needs_less() -> None:
    model = SHAPES["medium"].replace(vocab_size=2048)
    totals = [
        predicted(planned(model, recompute=recompute), model).total
        for recompute in ("none", 2, "full")
    ]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < 0.5 * totals[0]


def test_a_gpu_holds_no_process_and_longer_chunks() -> None:
    model = SMALL.replace(vocab_size=128_256)
    on_cpu = predicted(planned(model), model)
    plan = replace(planned(model), precision=Precision(device="cuda"))
    on_gpu = predicted(plan, model)
    assert on_gpu.process == on_gpu.libraries == on_gpu.gaps == on_gpu.checkpoint == 0
    assert on_gpu.outputs > on_cpu.outputs


def test_an_evaluation_counts_where_it_needs_more_than_a_step() -> None:
    plan = planned(batch=2, microbatch=1)
    assert predicted(plan, scored_rows=1).evaluation == 0
    rows = 64
    more = predicted(plan, scored_rows=rows)
    step = more.activations + more.outputs + more.recomputed + more.gaps
    wanted = (SMALL.scoring_bytes(rows) + SMALL.logits_bytes(rows)) * (1 + GAP_SHARE)
    assert more.evaluation == int(wanted) - step


SCRIPT = """
import sys
# None makes `import torch` raise ImportError, as if it were not installed.
sys.modules["torch"] = sys.modules["mpi4py"] = None
from mpillm.models.decoder import SHAPES
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import plan_step
from mpillm.plan.peak_memory import predict_peak
from mpillm.train.optimizers import optimizer_catalog
model = SHAPES["llama-8b"]
plan = plan_step(model, ParallelSettings(pipeline=8), 1, 32)
optimizer = optimizer_catalog.optimizer_class("adamw")()
print(predict_peak(model, plan, optimizer).describe())
"""


def test_a_plan_is_priced_without_torch_and_mpi(python: Any) -> None:
    done = python("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("about ")
    assert "GiB (" in done.stdout


@pytest.mark.parametrize("layers", [1 << 60])
def test_absurd_sizes_take_no_time(layers: int) -> None:
    model = SMALL.replace(layers=layers)
    kept, again = model.recompute_bytes(model.whole, 1, 4, 2)
    assert kept > layers
    assert again > 0


def test_ranks_of_a_context_axis_share_the_activations() -> None:
    whole, shared = planned(), replace(planned(), context=2)
    one, half = predicted(whole), predicted(shared)
    assert half.activations == pytest.approx(one.activations / 2, rel=0.01)
    assert half.weights == one.weights
    assert one.attention == 0
    _, heads, width = SMALL.attention_shape
    # Two rows of keys and values, and one of gradients, of half the positions.
    numbers = 2 * shared.microbatch * SMALL.context // 2 * heads * width
    assert half.attention >= 3 * 4 * numbers
    # Tensor ranks that do not divide three heads of keys and values hold one for each head of
    # queries: six of twelve.
    grouped = SMALL.replace(width=48, heads=12, kv_heads=3)
    cut, whole = (predicted(shared, grouped, replicas=Replicas(tensor=n)) for n in (2, 1))
    assert cut.attention == 2 * whole.attention


def test_ranks_of_a_tensor_axis_see_each_others_streams() -> None:
    """In the resident set of each, in pages that count once on their node."""
    plan = planned(microbatch=2)
    plain, shared, apart = (
        predicted(plan, replicas=Replicas(tensor=tensor, neighbours=neighbours))
        for tensor, neighbours in ((1, 2), (2, 2), (2, 1))
    )
    assert plain.streams == 0
    # Two streams a block, of which each rank counts a half among its activations.
    stream = 4 * 2 * SMALL.context * SMALL.width
    scored = 4 * SMALL.context * SMALL.width
    others = (2 * SMALL.blocks * stream + 2 * scored) // 2
    rows = 2 * (stream + scored)
    assert apart.streams == others
    assert apart.counted_elsewhere["streams"] == 0
    assert shared.streams == others + rows + rows // 2
    assert shared.streams - shared.counted_elsewhere["streams"] == rows
    again = predicted(replace(plan, recompute="full"), replicas=Replicas(tensor=2, neighbours=2))
    assert again.streams < shared.streams
