"""Queries, keys and values of whole sequences, of which ranks attend with their positions."""

import torch

from mpillm.comm.mesh import Axis
from mpillm.machine.node_map import NodeMap
from mpillm.models.layers.attention import attend
from mpillm.parallel.context.zigzag import own_positions
from tests.models.attention_inputs import make_qkv


def axis_of(comm, nodes=None):
    """Return the axis of all ranks; `nodes`: as if they were the nodes."""
    map_of_nodes = None if nodes is None else NodeMap(tuple(map(tuple, nodes)))
    return Axis("context", comm.size, comm.rank, comm, map_of_nodes)


def largest_error(kernel, comm, shape, pattern, spans=None, turns=1):
    """Compare output and gradients of `kernel` with whole attention; return the largest error.

    `shape`: rows, length, heads, heads of keys and values, width. The error of a tensor is the norm
    of the difference over its norm, on all ranks together.
    """
    *qkv, grad = make_qkv(*shape)
    wanted = attend(*qkv, pattern, spans)
    wanted = [wanted, *torch.autograd.grad(wanted, qkv, grad)]
    places = torch.from_numpy(own_positions(comm.rank, comm.size, shape[1]))
    errors = []
    for _ in range(turns):
        own = [x.detach()[:, places].requires_grad_() for x in qkv]
        found = kernel(*own, pattern, spans)
        found = [found, *torch.autograd.grad(found, own, grad[:, places])]
        for one, other in zip(found, wanted, strict=True):
            difference = (one - other[:, places]).detach().double().square().sum()
            scale = float(other.detach().double().square().sum())
            errors.append((comm.allreduce(float(difference)) / scale) ** 0.5)
    return max(errors)
