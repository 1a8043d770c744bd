"""The tensor axis: which models it cuts, in how many parts, and what it sends."""

import pytest

from mpillm.models.classifiers import LSTMConfig
from mpillm.models.decoder import DecoderConfig
from mpillm.models.encoder import EncoderConfig
from mpillm.models.encoder_decoder import EncoderDecoderConfig
from mpillm.models.spec import ModelSpec
from mpillm.parallel.parallel_axis import MessageBytes
from mpillm.parallel.tensor.tensor_axis import TensorAxis

SPEC = DecoderConfig(layers=4, width=48, heads=12, kv_heads=3, context=24, vocab_size=50)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_heads_that_the_ranks_divide_are_cut(size: int) -> None:
    assert TensorAxis().fault(size, SPEC, 8) == ""


@pytest.mark.parametrize(
    ("size", "model", "words"),
    [
        (5, SPEC, "nearest legal value is 4"),
        (8, SPEC, "nearest legal value is 6"),
        (12, SPEC.replace(vocab_size=8), "vocabulary of 8"),
        (2, SPEC.replace(experts=4), "4 experts"),
        (2, EncoderConfig(head="none"), "whole sequences"),
        (2, EncoderDecoderConfig(), "source"),
    ],
)
def test_a_fault_names_the_rule(size: int, model: ModelSpec, words: str) -> None:
    fault = TensorAxis().fault(size, model, 8)
    assert words in fault
    assert f"parallel.tensor = {size}" in fault


def test_traffic_is_eight_exchanges_a_block_and_four_of_the_ends() -> None:
    sizes = {"data": 2, "pipeline": 2, "tensor": 4}
    stream = 4 * (8 / 2) * 24 * 48
    found = TensorAxis().traffic_bytes(sizes, SPEC, 8, 1, MessageBytes())
    assert found == (8 * 4 + 4) / 2 * stream * 3 / 4
    assert TensorAxis().traffic_bytes({"data": 2}, SPEC, 8, 1, MessageBytes()) == 0
    context = TensorAxis().traffic_bytes({**sizes, "context": 2}, SPEC, 8, 1, MessageBytes())
    assert context == found / 2


def test_other_architectures_that_name_cuts_are_refused() -> None:
    class Named(LSTMConfig):
        cut_dims = {"head.weight": 0}  # noqa: RUF012

    fault = TensorAxis().fault(2, Named(), 8)
    assert "derive from BlockSettings" in fault
