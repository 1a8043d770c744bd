"""Dropout: its masks follow from keys alone."""

import pytest
import torch

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.dropout import (
    ATTENTION_OUTPUT,
    FEED_FORWARD_OUTPUT,
    PlacedKeys,
    drop,
    keep_mask,
    layer_keys,
)
from mpillm.models.linear_head import plain_outputs
from mpillm.models.part_module import create
from mpillm.models.spec import Part

KEYS = torch.tensor([5, 6, -7, 1 << 62])
HALF = 1 << 15


def mask(keys, count=1 << 16, kept=HALF):
    return keep_mask(keys, count, kept).float()


@pytest.mark.parametrize("kept", [1, HALF // 4, HALF, 60_000, (1 << 16) - 1])
def test_the_share_of_kept_values_is_the_probability(kept):
    share = kept / 65536
    found = mask(KEYS, 1 << 17, kept).mean(1)
    # Five standard deviations of a mean of 2¹⁷ draws.
    bound = 5 * (share * (1 - share) / (1 << 17)) ** 0.5
    assert (found - share).abs().max() <= bound


def test_masks_of_neighbours_are_independent():
    keys = torch.cat(
        [layer_keys(torch.arange(4) + row, layer) for row in (0, 1000) for layer in (0, 1, 2)]
    )
    keys = torch.cat([keys, keys ^ 1])
    rows = mask(keys.unique())
    found = torch.corrcoef(rows).fill_diagonal_(0).abs().max()
    # 47 rows have a thousand pairs; a correlation of 2¹⁶ draws has a deviation of 2⁻⁸.
    assert found < 6 / 256
    for shift in (1, 2, 3, 16, 256, 1 << 15):
        pairs = (rows[:, shift:] - 0.5) * (rows[:, :-shift] - 0.5)
        assert pairs.mean().abs() < 6 * 0.25 / pairs.numel() ** 0.5, shift
    # A row is no other row's, shifted.
    spectra = torch.fft.rfft(rows[:8] - 0.5)
    for one in range(8):
        for other in range(one):
            shifted = torch.fft.irfft(spectra[one] * spectra[other].conj())
            assert shifted.abs().max() < 8 * 0.25 * (1 << 16) ** 0.5


def test_a_mask_does_not_depend_on_its_batch():
    whole = keep_mask(KEYS, 70_001, HALF)
    for row, key in enumerate(KEYS):
        assert torch.equal(keep_mask(key[None], 70_001, HALF)[0], whole[row])
    # Nor on its length: a longer row begins with the same values.
    assert torch.equal(keep_mask(KEYS, 99, HALF), whole[:, :99])


def test_the_mean_is_kept_and_gradients_have_the_same_mask():
    x = torch.ones(4, 64, 128, requires_grad=True)
    y = drop(x, 0.25, KEYS, ATTENTION_OUTPUT)
    assert y.detach().unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(y.detach().mean()) == pytest.approx(1, abs=0.02)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    other = drop(x, 0.25, KEYS, FEED_FORWARD_OUTPUT)
    assert not torch.equal(other, y)


def test_it_is_off_without_keys_or_a_probability():
    x = torch.ones(4, 8)
    assert drop(x, 0.5, None, 0) is x
    assert drop(x, 0.0, KEYS, 0) is x
    assert drop(x, 1e-9, KEYS, 0).isfinite().all()


def model(part=None, **changes):
    config = {"layers": 2, "width": 32, "heads": 4, "context": 16, "vocab_size": 50, **changes}
    return create(DecoderConfig(**config), 1, part=part)


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout", "embedding_dropout"])
def test_each_kind_changes_training_alone(kind):
    dropping, plain = model(**{kind: 0.2}), model()
    ids = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(3))
    assert dropping.spec.drops
    assert not plain.spec.drops
    with torch.inference_mode():
        expected = plain(ids)
        assert torch.equal(dropping(ids), expected)
        given = {"ids": ids, "dropout_keys": KEYS}
        (found,) = plain_outputs(dropping.forward_part(given, ()).outputs)
        assert not torch.allclose(found, expected)
        (same,) = plain_outputs(plain.forward_part(given, ()).outputs)
        assert torch.equal(same, expected)
        # Row by row, and in parts, as in microbatches and pipelines.
        for row in range(4):
            given = {"ids": ids[row : row + 1], "dropout_keys": KEYS[row : row + 1]}
            (alone,) = plain_outputs(dropping.forward_part(given, ()).outputs)
            torch.testing.assert_close(alone, found[row : row + 1])
        given, streams = {"ids": ids, "dropout_keys": KEYS}, ()
        for number in range(2):
            part = model(Part(number, number + 1), **{kind: 0.2})
            streams = plain_outputs(part.forward_part(given, streams).outputs)
        assert torch.equal(streams[0], found)


@pytest.mark.parametrize("width", [1, 6, 7])
def test_a_mask_of_some_positions_is_that_of_the_row(width):
    x = torch.ones(4, 20, width)
    whole = drop(x, 0.4, KEYS, ATTENTION_OUTPUT)
    for places in ([0, 1, 2, 3], [5, 3, 19, 4], list(range(20))):
        keys = PlacedKeys(KEYS, torch.tensor(places))
        assert torch.equal(drop(x[:, places], 0.4, keys, ATTENTION_OUTPUT), whole[:, places])
