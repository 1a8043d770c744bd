"""Rotary positions."""

import pytest
import torch

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
