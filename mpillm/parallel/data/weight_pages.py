"""Weights once a node: in memory that the ranks of a node share, each writing its own shard."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from mpillm.comm.shared.segment import share_segment
from mpillm.parallel.data.shard_group import ShardGroup
from mpillm.parallel.data.shard_layout import LINE_ELEMENTS


def place_once_a_node(
    weights: Sequence[nn.Parameter],
    dtype: torch.dtype,
    group: ShardGroup,
    warn: Callable[[str], None],
) -> bool:
    """Move `weights` into memory that the ranks of each node share; they have no values then.

    Returns False on all ranks, with the weights where they were, where ranks share no memory: on
    GPUs, with one rank a host or unevenly many, or without room, after a warning. Every rank of the
    group calls it with weights of the same shapes.
    """
    sizes = [-(-weight.numel() // LINE_ELEMENTS) * LINE_ELEMENTS for weight in weights]
    nbytes = sum(sizes) * dtype.itemsize
    if group.within is None or any(weight.is_cuda for weight in weights):
        return False
    comm = group.within.comm
    found = share_segment(comm, -(-nbytes // comm.size))
    fault = found if isinstance(found, str) else ""
    if faults := [text for text in group.axis.comm.allgather(fault) if text]:
        if group.axis.rank == 0:
            warn(
                f"{faults[0]}; the weights ({nbytes:,} bytes) are gathered layer by layer instead "
                "of once a host"
            )
        return False
    assert not isinstance(found, str)
    # The rows of the ranks follow each other without a gap: one array.
    whole = torch.from_numpy(found.whole[:nbytes]).view(dtype)
    for weight, room in zip(weights, torch.split(whole, sizes), strict=True):
        weight.data = room[: weight.numel()].view(weight.shape)
    return True


def place_alone(
    weights: Sequence[nn.Parameter],
    dtype: torch.dtype,
    device: torch.device | None = None,
    freed: bool = False,
) -> None:
    """Give `weights` memory of `dtype` of this rank's own; they have no values then.

    `device`: None leaves each where it is. `freed`: free the memory of each at once, so that no two
    have any; a gather allocates it again.
    """
    for weight in weights:
        weight.data = torch.empty(weight.shape, dtype=dtype, device=device or weight.device)
        if freed:
            weight.untyped_storage().resize_(0)


def aliases(weights: Sequence[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
    """Map each weight that is another leaf over the memory of an earlier one to that one."""
    first: dict[int, nn.Parameter] = {}
    found = {}
    for weight in weights:
        other = first.setdefault(weight.data_ptr(), weight)
        if other is not weight and weight.numel():
            found[weight] = other
    return found
