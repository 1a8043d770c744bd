"""Compare the weights of the ranks of an axis, or broadcast them."""

from collections import Counter
from collections.abc import Iterable
from itertools import zip_longest

import xxhash
from torch import Tensor

from mpillm.comm.buffers import as_buffer, message_spans
from mpillm.comm.mesh import Axis
from mpillm.errors import CommError


def broadcast_parameters(parameters: Iterable[Tensor], axis: Axis, root: int = 0) -> None:
    """Overwrite `parameters` (contiguous, on the CPU) by those of rank `root`, bit by bit.

    Every rank of the axis calls it, with the same shapes in the same order.
    """
    for parameter in parameters:
        octets = as_buffer(parameter).octets
        for first, stop in message_spans(octets.size):
            axis.comm.Bcast(octets[first:stop], root)


def check_same(parameters: Iterable[Tensor], axis: Axis) -> None:
    """Compare digests (XXH3, 128 bits) of `parameters` over the ranks of the axis.

    Every rank of the axis calls it. Where they differ, all raise CommError with the ranks that
    differ from the majority and the first parameter that differs.
    """
    # The digest of all digests first: 32 bytes a rank in the usual case, where nothing differs.
    digests = [_digest(parameter) for parameter in parameters]
    total = xxhash.xxh3_128_hexdigest(repr(digests).encode())
    if len(set(axis.comm.allgather(total))) == 1:
        return
    index, apart = first_difference(axis.comm.allgather(digests))
    raise CommError(
        f"the ranks along {axis.name} must hold the same weights, but "
        f"{', '.join(f'rank {rank}' for rank in apart)} of {axis.size} differs, first in parameter "
        f"{index} of {len(digests)}; start all ranks from one seed or checkpoint"
    )


def first_difference(everywhere: list[list[str]]) -> tuple[int, list[int]]:
    """Return the first index at which the ranks' digests differ, and the ranks that differ from the
    majority there.

    Where two values are equally frequent, rank 0's counts as the majority.
    """
    for index, found in enumerate(zip_longest(*everywhere)):
        usual = Counter(found).most_common(1)[0][0]
        if apart := [rank for rank, digest in enumerate(found) if digest != usual]:
            return index, apart
    raise AssertionError("called with equal digests")


def _digest(parameter: Tensor) -> str:
    octets = as_buffer(parameter.detach().cpu()).octets
    return f"{tuple(parameter.shape)} {xxhash.xxh3_128_hexdigest(octets.data)}"
