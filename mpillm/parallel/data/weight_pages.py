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

    Returns False on all ranks, with the weights where they were, where some node has no room or
    its ranks share no memory. Every rank of the group calls it with weights of the same shapes.
    """
    sizes = [-(-weight.numel() // LINE_ELEMENTS) * LINE_ELEMENTS for weight in weights]
    nbytes = sum(sizes) * dtype.itemsize
    fault = "one rank a host, or unevenly many, share no memory"
    if any(weight.is_cuda for weight in weights):
        fault = "GPUs share no memory of the host"
    elif group.within is not None:
        comm = group.within.comm
        found = share_segment(comm, -(-nbytes // comm.size))
        fault = found if isinstance(found, str) else ""
    faults = [text for text in group.axis.comm.allgather(fault) if text]
    if faults:
        if group.axis.rank == 0:
            warn(f"{faults[0]}; each rank keeps its own copy of the weights ({nbytes:,} bytes)")
        return False
    assert not isinstance(found, str)
    # The rows of the ranks follow each other without a gap: one array.
    whole = torch.from_numpy(found.whole[:nbytes]).view(dtype)
    for weight, room in zip(weights, torch.split(whole, sizes), strict=True):
        weight.data = room[: weight.numel()].view(weight.shape)
    return True


def place_alone(weights: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
    """Give `weights` memory of `dtype` of this rank's own; they have no values then."""
    for weight in weights:
        weight.data = torch.empty(weight.shape, dtype=dtype, device=weight.device)


def aliases(weights: Sequence[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
    """Map each weight that is another leaf over the memory of an earlier one to that one."""
    first: dict[int, nn.Parameter] = {}
    found = {}
    for weight in weights:
        other = first.setdefault(weight.data_ptr(), weight)
        if other is not weight and weight.numel():
            found[weight] = other
    return found
