"""The order of windows: pure functions of (seed, sample id), never of the number of ranks.

    sample id k = step · global_batch + position
    epoch = k // n,  index = permute(k mod n; seed, epoch)
    start = index · context + phase(seed, epoch)

Nothing is stored: a permutation of a trillion windows costs no memory; a run resumes at any step.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mpillm.errors import DataError

# Six rounds of one multiplication each scatter windows well; an order needs no cryptography.
ROUNDS = 6
DROPOUT_TAG = 0xD509  # any odd word
TASK_ROUND, TASK_TAG = 1 << 21, 0x7A5D
PHASE_ROUND = 1 << 20  # a round number that no permutation uses

Int64s = np.ndarray[Any, np.dtype[np.int64]]
UInt64s = np.ndarray[Any, np.dtype[np.uint64]]


def mix(values: UInt64s) -> UInt64s:
    """Mix 64-bit words by a bijection in which each output bit depends on all input bits.

    SplitMix64 (Steele et al. 2014).
    """
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def keys_of(seed: int, epochs: Int64s, number: int) -> UInt64s:
    """Make a 64-bit key for each epoch: round key `number` of the permutation, or the phase's."""
    words = np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64)
    return mix(mix(mix(words) ^ epochs.astype(np.uint64)) ^ np.uint64(number))


def dropout_keys(seed: int, step: int, first: int, count: int) -> Int64s:
    """Make the key of the dropout masks of each row `first` … `first` + `count` - 1 of the global
    batch of `step`.
    """
    rows = np.arange(first, first + count, dtype=np.int64)
    # Mixed once more: round keys of a permutation are other numbers.
    return mix(keys_of(seed, rows, step) ^ np.uint64(DROPOUT_TAG)).astype(np.int64)


def task_keys(seed: int, samples: Int64s) -> Int64s:
    """Make the key of a task's random choices for each of `samples`, both int64 (n,)."""
    return mix(keys_of(seed, samples, TASK_ROUND) ^ np.uint64(TASK_TAG)).astype(np.int64)


def permute(indices: Int64s, count: int, seed: int, epochs: Int64s) -> Int64s:
    """Permute `indices`, each in [0, count), by the permutation of [0, count) for (seed, epoch).

    `indices` and `epochs`: shape (n,). A Feistel network over the next power of two; values outside
    pass through it again (cycle walking, Black & Rogaway 2002), so the map stays a bijection.
    """
    if count <= 1:
        return np.zeros_like(indices)
    unique, which = np.unique(epochs, return_inverse=True)
    round_keys = np.stack([keys_of(seed, unique, number) for number in range(ROUNDS)])
    # One epoch is the usual case: its keys broadcast.
    keys = round_keys if len(unique) == 1 else round_keys[:, which]
    bits = max(2, int(count - 1).bit_length())
    values = _feistel(indices.astype(np.uint64), keys, bits)
    outside = np.flatnonzero(values >= count)
    while outside.size:
        walked = _feistel(values[outside], keys if len(unique) == 1 else keys[:, outside], bits)
        values[outside] = walked
        outside = outside[walked >= count]
    return values.astype(np.int64)


def _feistel(values: UInt64s, round_keys: UInt64s, bits: int) -> UInt64s:
    """Run the network once over words of `bits` bits: each half masks the other by its hash."""
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = (
        np.uint64((1 << (bits // 2)) - 1),
        np.uint64((1 << (bits - bits // 2)) - 1),
    )
    high, low = values >> low_bits, values & low_mask
    for number in range(0, ROUNDS, 2):
        high = high ^ (_hash(low ^ round_keys[number]) & high_mask)
        low = low ^ (_hash(high ^ round_keys[number + 1]) & low_mask)
    return (high << low_bits) | low


def _hash(words: UInt64s) -> UInt64s:
    """Hash by one multiplication: the keys are mixed well already."""
    with np.errstate(over="ignore"):
        words = words * np.uint64(0xD6E8FEB86659FD93)
    return words >> np.uint64(32)


@dataclass(frozen=True)
class WindowOrder:
    """The order in which windows of `context` + 1 tokens are taken from `n_tokens` tokens."""

    n_tokens: int
    context: int
    seed: int

    def __post_init__(self) -> None:
        if self.context < 1 or self.n_tokens < self.context + 1:
            raise DataError(
                f"a window of context {self.context} is {self.context + 1} tokens, the dataset has "
                f"{self.n_tokens}; prepare more text, or lower the context to "
                f"{max(1, self.n_tokens - 1)} or less"
            )

    @property
    def n_windows(self) -> int:
        """Windows in one epoch."""
        return max(1, (self.n_tokens - self.context) // self.context)

    def epochs(self, ids: Int64s) -> Int64s:
        return ids // self.n_windows

    def starts(self, ids: Int64s) -> Int64s:
        """Find the first token of each sample: int64 sample ids (n,) → int64 positions (n,)."""
        count = self.n_windows
        epochs = ids // count
        index = permute(ids - epochs * count, count, self.seed, epochs)
        return index * self.context + self._phases(epochs)

    def _phases(self, epochs: Int64s) -> Int64s:
        """Shift all windows of an epoch by some tokens, so that epochs cut the text differently."""
        slack = self.n_tokens - 1 - self.n_windows * self.context
        choices = min(self.context - 1, slack) + 1
        unique, which = np.unique(epochs, return_inverse=True)
        return (keys_of(self.seed, unique, PHASE_ROUND) % np.uint64(choices)).astype(np.int64)[
            which
        ]
