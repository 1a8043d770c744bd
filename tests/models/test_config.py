import dataclasses

import pytest
import torch

from mpillm.errors import RecipeError
from mpillm.models.decoder import SHAPES, DecoderConfig
from mpillm.models.stacks.decoder_stack import Decoder


@pytest.mark.parametrize("name", SHAPES)
def test_the_counted_parameters_are_the_models(name: str) -> None:
    config = dataclasses.replace(SHAPES[name], vocab_size=SHAPES[name].vocab_size or 777)
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(weight.numel() for weight in model.parameters()) == config.parameters


def test_the_named_shapes_have_the_sizes_of_their_names() -> None:
    assert SHAPES["gpt2-124m"].parameters == 124_439_808
    assert SHAPES["llama-1b"].parameters == 1_235_814_400
    assert SHAPES["llama-8b"].parameters == 8_030_261_248
    assert SHAPES["smollm2-135m"].parameters == 134_515_008
    assert SHAPES["mistral-7b"].parameters == 7_241_732_096
    assert SHAPES["mixtral-8x7b"].parameters == 46_702_792_704
    assert SHAPES["qwen2.5-0.5b"].parameters == 494_032_768
    assert SHAPES["qwen3-0.6b"].parameters == 596_049_920
    assert SHAPES["gemma-2b"].parameters == 2_506_172_416
    assert SHAPES["gemma2-2b"].parameters == 2_614_341_888
    assert SHAPES["gemma3-270m"].parameters == 268_098_176
    assert SHAPES["gemma3-1b"].parameters == 999_885_952


def test_a_width_that_the_heads_do_not_divide_names_the_nearest() -> None:
    with pytest.raises(
        RecipeError, match="width 130 is not divisible by 4 heads; use a width of 128 or 132"
    ):
        DecoderConfig(width=130, heads=4)


def test_heads_that_kv_heads_do_not_divide() -> None:
    with pytest.raises(RecipeError, match="6 heads are not divisible by 4 kv_heads"):
        DecoderConfig(width=96, heads=6, kv_heads=4)


def test_rotary_wants_an_even_head() -> None:
    with pytest.raises(RecipeError, match="even width"):
        DecoderConfig(width=12, heads=4)


def test_flops_follow_the_formula() -> None:
    config = DecoderConfig(
        layers=2, width=8, heads=2, hidden=16, context=4, vocab_size=10, activation="gelu"
    )
    products = 2 * (4 * 8 * 8 + 2 * 8 * 16) + 10 * 8
    assert config.flops_per_token == 6 * products + 12 * 2 * 8 * 4
