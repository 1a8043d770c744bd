"""Dropout (Srivastava et al. 2014) whose masks are a pure function of keys and positions.

A mask is a counter-based random number (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011): a hash of the value's place in its row, under a key of the row, the layer and the
place in the layer. No generator has a state, so a mask is the same on every rank and device, in
every microbatch, and when a layer is recomputed.

Shapes: B sequences, T positions, S positions attended to, H heads, C width, N values of a sequence.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Places in a layer; the embedding and the head count as layers of their own.
ATTENTION_PROBABILITIES, ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, EMBEDDING, HEAD = range(5)
EMBEDDING_LAYER, HEAD_LAYER = 1 << 32, 1 << 33
# Half a hash decides on one value: probabilities are multiples of 2⁻¹⁶.
LEVELS = 1 << 16
# Counters between the probabilities of two positions: 2¹⁶ positions attended to, two a counter.
POSITION_STRIDE = 1 << 15
# On a CPU a mask is made in pieces that stay in the second cache: twice as fast.
CACHED_WORDS = 1 << 16
# SplitMix64's step between states (Steele et al. 2014), as a signed number.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


class PlacedKeys(NamedTuple):
    """The keys of a layer whose T positions are not all of the row, nor its first ones."""

    keys_B: Tensor
    positions_T: Tensor
    """The places of the positions in the row."""


MaskKeys = Tensor | PlacedKeys
"""The keys of a layer: of whole rows, or of some of their positions."""


def of_rows(keys: MaskKeys, select: Callable[[Tensor], Tensor]) -> MaskKeys:
    """Return the keys of the rows that `select` takes of a tensor (B,)."""
    if isinstance(keys, PlacedKeys):
        return keys._replace(keys_B=select(keys.keys_B))
    return select(keys)


def layer_keys(keys_B: Tensor, layer: int) -> Tensor:
    """Derive the keys (B,) of a layer, int64, from those of the rows."""
    return _mix64(keys_B ^ _mix_number(layer))


def drop(
    x: Tensor, probability: float, keys: MaskKeys | None, place: int, first: int = 0
) -> Tensor:
    """Set values of `x` (B, …) to 0 with `probability`, and scale the rest to keep the mean.

    `keys`: of the layer; None outside of training, which returns `x`. With `PlacedKeys`, `x` is
    (B, T, C), and its mask is that of the whole row at these positions. `first`: the number of a
    row's first value, where `x` is a part of longer rows.
    """
    if keys is None or not probability:
        return x
    kept = _levels_kept(probability)
    if isinstance(keys, PlacedKeys):
        keys_B, skipped = keys.keys_B ^ _mix_number(place), first // x.shape[-1]
        positions_T = keys.positions_T[skipped : skipped + x.shape[1]]
        keeps = keep_mask_at(keys_B, positions_T, x.shape[-1], kept)
    else:
        count = x.numel() // max(1, len(x))
        keeps = keep_mask(keys ^ _mix_number(place), count, kept, first).reshape(x.shape)
    # The product saves the mask alone, a byte a value.
    return x * keeps * (LEVELS / kept)


def drop_probabilities(
    shares_BHTS: Tensor, probability: float, keys: MaskKeys | None, first_head: int = 0
) -> Tensor:
    """Drop an attention's probabilities, by masks that padding of the rows does not change.

    `first_head`: the number of the first head in the whole layer.
    """
    if keys is None or not probability:
        return shares_BHTS
    assert isinstance(keys, Tensor), "an attention with dropout has whole rows"
    rows, heads, positions, attended = shares_BHTS.shape
    heads_H = torch.arange(first_head, first_head + heads, device=keys.device)
    own_B1 = (keys ^ _mix_number(ATTENTION_PROBABILITIES))[:, None]
    keys_R = _mix64(own_B1 ^ _mix64(heads_H)).flatten()
    pairs = (attended + 1) // 2
    starts_T1 = torch.arange(positions, device=keys.device)[:, None] * POSITION_STRIDE
    counters_TS = starts_T1 + torch.arange(pairs, device=keys.device)
    kept = _levels_kept(probability)
    keeps_RN = _keeps_of(keys_R, counters_TS.flatten().to(torch.int32), kept)
    keeps_BHTS = keeps_RN.view(rows, heads, positions, 2 * pairs)[..., :attended]
    return shares_BHTS * keeps_BHTS * (LEVELS / kept)


def _levels_kept(probability: float) -> int:
    # At least one level each: a small probability is no 0, a large one no 1.
    return min(max(round(LEVELS * (1 - probability)), 1), LEVELS - 1)


def keep_mask(keys_B: Tensor, count: int, kept: int, first: int = 0) -> Tensor:
    """Draw numbers (B, N), N = `count`, int8: 1 with the probability `kept` / 2¹⁶, else 0.

    They are those from number `first` on of the rows' sequences.
    """
    # A counter decides on a pair.
    begin, skipped = divmod(first, 2)
    pairs = (skipped + count + 1) // 2
    counters_N = torch.arange(begin, begin + pairs, dtype=torch.int32, device=keys_B.device)
    return _keeps_of(keys_B, counters_N, kept)[:, skipped : skipped + count]


def keep_mask_at(keys_B: Tensor, positions_T: Tensor, width: int, kept: int) -> Tensor:
    """Draw the numbers (B, T, C), C = `width`, that `keep_mask` draws at `positions_T` of a row."""
    # A number is half a word: an odd width puts both halves of a word at two positions.
    each = width // 2 if width % 2 == 0 else width
    places_C = torch.arange(each, device=keys_B.device)
    places_TC = positions_T[:, None] * each + places_C
    if width % 2 == 0:
        keeps_BN = _keeps_of(keys_B, places_TC.flatten().to(torch.int32), kept)
    else:
        words_BN2 = _keeps_of(keys_B, (places_TC // 2).flatten().to(torch.int32), kept)
        halves_N1 = (places_TC % 2).flatten()[:, None]
        halves_BN1 = halves_N1.expand(len(keys_B), -1, 1)
        keeps_BN = words_BN2.unflatten(1, (-1, 2)).gather(2, halves_BN1)  # type: ignore[no-untyped-call]
    return keeps_BN.view(len(keys_B), len(positions_T), width)


def _keeps_of(keys_B: Tensor, counters_N: Tensor, kept: int) -> Tensor:
    """Draw two numbers for each of the counters, int32 (N,): (B, 2 · N)."""
    pairs = len(counters_N)
    words_B1 = _mix64(keys_B)[:, None]
    starts_B1 = (words_B1 >> 32).to(torch.int32)
    # Each row has its own odd step between counters: two rows are not one sequence, shifted.
    steps_B1 = words_B1.to(torch.int32) | 1
    keeps_BN = torch.empty(len(keys_B), 2 * pairs, dtype=torch.int8, device=keys_B.device)
    on_cpu = keys_B.device.type == "cpu"
    piece = max(1, CACHED_WORDS // max(1, len(keys_B))) if on_cpu else max(1, pairs)
    for start in range(0, pairs, piece):
        stop = min(start + piece, pairs)
        bits = _mix32_((counters_N[start:stop] * steps_B1).add_(starts_B1)).view(torch.int16)
        # In place: a comparison that makes booleans takes three times as long on a CPU.
        keeps_BN[:, 2 * start : 2 * stop] = bits.lt_(kept - LEVELS // 2)
    return keeps_BN


def _mix64(words: Tensor) -> Tensor:
    """Mix int64 words by SplitMix64's bijection."""
    # Shifts of signed words copy the sign: the masks remove the copies.
    words = words + GOLDEN
    words = (words ^ ((words >> 30) & ((1 << 34) - 1))) * (0xBF58476D1CE4E5B9 - (1 << 64))
    words = (words ^ ((words >> 27) & ((1 << 37) - 1))) * (0x94D049BB133111EB - (1 << 64))
    return words ^ ((words >> 31) & ((1 << 33) - 1))


def _mix_number(number: int) -> int:
    """Spread a small number over 63 bits."""
    return ((number + 1) * (GOLDEN & ((1 << 63) - 1))) & ((1 << 63) - 1)


def _mix32_(words: Tensor) -> Tensor:
    """Mix int32 words in place, by the bijection lowbias32 (Wellons, "Hash prospector", 2018)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        words ^= (words >> shift).bitwise_and_((1 << (32 - shift)) - 1)
        words *= factor
    words ^= (words >> 16).bitwise_and_(0xFFFF)
    return words
