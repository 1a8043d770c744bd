"""The context axis: what it refuses, and its traffic."""

import pytest

from mpillm.errors import LayoutError
from mpillm.models.decoder import DecoderConfig
from mpillm.models.encoder import EncoderConfig
from mpillm.parallel.axis_sizes import mesh_sizes
from mpillm.parallel.context.context_axis import ContextAxis
from mpillm.parallel.context.context_traffic import attention_bytes
from mpillm.parallel.parallel_axis import MessageBytes
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import plan_step, traffic_bytes

MODEL = DecoderConfig(layers=4, vocab_size=100, context=96, kv_heads=2)
AXIS = ContextAxis()


def test_the_mesh_has_the_axis_where_it_has_ranks():
    assert "context" not in mesh_sizes(ParallelSettings(), 4, MODEL, 8)
    found = mesh_sizes(ParallelSettings(context=2, pipeline=2), 8, MODEL, 8)
    assert found == {"data": 2, "pipeline": 2, "context": 2}


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({"context": 100}, 3, r"100 positions .* 3 context ranks \(model.context = 96 or 102 can"),
        ({"context": 5}, 4, r"\(model.context = 8 can"),
        ({"attention_dropout": 0.1}, 2, "attention_dropout = 0.1 drops probabilities"),
        ({"experts": 4, "balance_loss": 0.01}, 2, "balance_loss = 0.01 counts"),
    ],
)
def test_what_ranks_cannot_share_is_refused_with_the_way_out(changes, size, words):
    model = MODEL.replace(**changes)
    assert AXIS.fault(1, model, 8) == ""
    with pytest.raises(LayoutError, match=words):
        mesh_sizes(ParallelSettings(context=size), size, model, 8)


def test_other_architectures_are_refused():
    encoder = EncoderConfig(layers=2, vocab_size=100, context=96)
    assert "'encoder' computes whole sequences" in AXIS.fault(2, encoder, 8)
    assert AXIS.fault(2, MODEL, 8) == ""


def test_a_fixed_order_is_refused():
    with pytest.raises(LayoutError, match=r"parallel\.context = 2 adds up the terms"):
        plan_step(MODEL, ParallelSettings(context=2), 1, 8, 1, fixed_order=True)


def test_traffic_is_that_of_attention_and_of_more_gradients():
    sizes, element = {"data": 2, "pipeline": 2, "context": 2}, MessageBytes(2, 4)
    found = AXIS.traffic_bytes(sizes, MODEL, 8, 1, element)
    # Four sequences a data rank, two layers a stage.
    attention = 4 * 2 * sum(attention_bytes("ring", 2, MODEL.attention_shape, 96, 2, 4))
    gradients = 4 * MODEL.parameters / 2
    assert found == attention + 2 * gradients * (3 / 4 - 1 / 2)
    both = traffic_bytes(sizes, MODEL, 8, 1)
    assert both["data"] + both["context"] > 2 * gradients * 3 / 4
    assert AXIS.traffic_bytes({"data": 2}, MODEL, 8, 1, element) == 0


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_tensor_ranks_and_islands_share_what_attention_moves(kind):
    model = MODEL.replace(heads=8, kv_heads=4)
    sizes, element = {"island": 2, "tensor": 2, "context": 2}, MessageBytes(context_kind=kind)
    # Four sequences an island, in four layers.
    attention = 4 * 4 * sum(attention_bytes(kind, 2, (4, 2, model.head_features), 96))
    gradients = 4 * model.parameters / 2
    found = AXIS.traffic_bytes(sizes, model, 8, 1, element)
    assert found == attention + 2 * gradients * (1 - 1 / 2)
