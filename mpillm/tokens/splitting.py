"""Which document goes where: to training or validation, and to which shard. Pure functions of keys and counts."""

from typing import Any

import numpy as np

from mpillm.tokens.order import mix

Array = np.ndarray[Any, np.dtype[Any]]

TRAIN, VALIDATION = 0, 1
# The shard is read off the key itself; the split must not be, or validation would fill the first shards only.
SPLIT_SALT = np.uint64(0x7E57)


def split_of(keys: Array, validation: float) -> Array:
    """0 (train) or 1 (validation) for each key: a fraction `validation` of all documents, by hash."""
    return (mix(keys ^ SPLIT_SALT) < np.uint64(min(int(validation * 2.0**64), 2**64 - 1))).astype(
        np.uint8
    )


def cut_tail(text: str, validation: float) -> tuple[str, str]:
    """Cut a text in two, the second part about a fraction `validation` of it from a line's start if there is one."""
    target = min(len(text) - 1, max(1, round(len(text) * (1 - validation))))
    after = text.find("\n", target - 1) + 1
    if not 0 < after < len(text):
        after = text.rfind("\n", 0, target) + 1
    place = after if 0 < after < len(text) else max(0, target)
    return text[:place], text[place:]


def ranges_for(n_bytes: int, shard_bytes: int) -> int:
    """How many shards of about `shard_bytes` hold `n_bytes`."""
    return -(-n_bytes // shard_bytes)


def range_of(keys: Array, ranges: int) -> Array:
    """Which of `ranges` equal ranges of the hash space each key falls in."""
    return (((keys >> np.uint64(32)) * np.uint64(ranges)) >> np.uint64(32)).astype(np.int64)
