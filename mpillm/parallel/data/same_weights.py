"""Data parallel: every rank of the axis holds the same weights and a share of the batch."""

from collections import Counter
from collections.abc import Iterable
from itertools import zip_longest

import xxhash
from torch import Tensor

from mpillm.comm.buffers import as_buffer
from mpillm.comm.mesh import Axis
from mpillm.errors import CommError, LayoutError

BCAST_PIECE_BYTES = 2**30


def share_batch(global_batch: int, axis: Axis) -> tuple[int, int]:
    """(first, count): which sequences of the global batch are this rank's. Equal shares, in rank order.

    Raises LayoutError, on every rank, when the ranks do not divide the batch.
    """
    share, rest = divmod(global_batch, axis.size)
    if rest or share < 1:
        below, above = share * axis.size, (share + 1) * axis.size
        batches = f"{below} or {above}" if below > 0 else f"{above}"
        ranks = max(
            (n for n in range(1, axis.size) if global_batch > 0 and global_batch % n == 0),
            default=0,
        )
        raise LayoutError(
            f"a global batch of {global_batch} sequences cannot be shared by {axis.size} ranks; use {batches}"
            + (f", or {ranks} rank{'s' * (ranks > 1)} along {axis.name}" if ranks else "")
        )
    return axis.rank * share, share


def broadcast_parameters(parameters: Iterable[Tensor], axis: Axis, root: int = 0) -> None:
    """Overwrite `parameters` (contiguous, on the CPU) by those of rank `root`, bit by bit.

    Every rank of the axis calls it, with the same shapes in the same order.
    """
    for parameter in parameters:
        octets = as_buffer(parameter).octets
        for first in range(0, octets.size, BCAST_PIECE_BYTES):
            axis.comm.Bcast(octets[first : first + BCAST_PIECE_BYTES], root)


def check_same(parameters: Iterable[Tensor], axis: Axis) -> None:
    """Prove that all ranks hold bitwise the same `parameters`, by comparing digests (XXH3, 128 bits).

    Every rank of the axis calls it. Where they differ, all raise CommError with the ranks that stand apart
    from the most and the first parameter that differs.
    """
    digests = [_digest(parameter) for parameter in parameters]
    total = xxhash.xxh3_128_hexdigest(repr(digests).encode())
    if len(set(axis.comm.allgather(total))) == 1:
        return
    index, apart = first_difference(axis.comm.allgather(digests))
    raise CommError(
        f"the ranks along {axis.name} must hold the same weights, but {', '.join(f'rank {rank}' for rank in apart)} of "
        f"{axis.size} stands apart, first in parameter {index} of {len(digests)}; start all ranks from one seed or "
        "checkpoint"
    )


def first_difference(everywhere: list[list[str]]) -> tuple[int, list[int]]:
    """Of each rank's digests: where they first differ, and the ranks apart from the majority (a tie: from
    rank 0).
    """
    for index, found in enumerate(zip_longest(*everywhere)):
        usual = Counter(found).most_common(1)[0][0]
        if apart := [rank for rank, digest in enumerate(found) if digest != usual]:
            return index, apart
    raise AssertionError("called with equal digests")


def _digest(parameter: Tensor) -> str:
    return f"{tuple(parameter.shape)} {xxhash.xxh3_128_hexdigest(as_buffer(parameter).octets.data)}"
