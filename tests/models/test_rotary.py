"""Rotary positions."""

import pytest
import torch

from mpillm.errors import RecipeError
from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.rotary import Rotary, rotate


def make_rotary(context=64, head_width=8):
    return Rotary(DecoderConfig(heads=1, width=head_width, context=context))


def test_scores_depend_on_the_distance_alone():
    rotary = make_rotary()
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 1, 1, 8, generator=generator) for _ in range(2))

    def rotated(x, position):
        return rotate(x, rotary(position, 1, torch.float32))

    scores = [float((rotated(q, first + 5) * rotated(k, first)).sum()) for first in (0, 7, 50)]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)


def test_a_share_turns_the_first_features_alone():
    config = DecoderConfig(heads=1, width=8, context=16, rope_share=0.5)
    x = torch.randn(2, 16, 1, 8, generator=torch.Generator().manual_seed(3))
    found = rotate(x, Rotary(config)(0, 16, torch.float32))
    narrow = rotate(x[..., :4], make_rotary(16, 4)(0, 16, torch.float32))
    assert torch.equal(found, torch.cat([narrow, x[..., 4:]], dim=-1))


@pytest.mark.parametrize(("share", "features"), [(0.1, 0), (0.4, 3)])
def test_features_turn_in_pairs(share, features):
    words = rf"rope_share = {share} turns {features} of the 8 features.*take a share such as 0.25"
    with pytest.raises(RecipeError, match=words):
        DecoderConfig(heads=1, width=8, rope_share=share)
