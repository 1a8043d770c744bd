"""Compile a model's layers by torch.compile, one node's ranks with one compilation.

Layer by layer: all layers have one graph, so that the time does not grow with depth, and the hooks
of autograd and the messages stay outside of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from mpillm.comm.waiting import patient_barrier
from mpillm.machine.node_map import NodeMap
from mpillm.models.part_module import PartModule, torch_explained

if TYPE_CHECKING:
    from mpi4py import MPI


def compile_layers(
    parts: Sequence[PartModule],
    rows: int,
    comm: "MPI.Intracomm",
    node_map: NodeMap,
    warn: Callable[[str], None],
) -> bool:
    """Compile the layers of `parts` for microbatches of `rows` sequences; True where that worked.

    The first rank of each node compiles, the others then find its code in the compiler's cache
    (system/compile_cache.py). Every rank of `comm` calls it. Where it fails on a rank, all compute
    without, after one warning.
    """
    layers = [layer for part in parts for layer in part.compiled_layers()]
    fault = "" if layers else "the architecture names no layers that it may compile"
    node = node_map.split(comm)
    for first in (True, False):
        # Their processors would compile the same code at the same time.
        if (node.rank == 0) == first and layers:
            fault = _try(layers[0], parts, rows)
        patient_barrier(node)
    node.Free()
    faults = [text for text in comm.allgather(fault) if text]
    if faults:
        for layer in layers:
            layer._compiled_call_impl = None
        warn(f"train.compile: torch could not compile, so the run computes without: {faults[0]}")
    return not faults


def _try(layer: torch.nn.Module, parts: Sequence[PartModule], rows: int) -> str:
    """Compile all layers, and run the first one forward and backward; return what failed, or ""."""
    try:
        for part in parts:
            for each in part.compiled_layers():
                each.compile()
        part = next(part for part in parts if part.compiled_layers())
        arguments = part.layer_arguments(rows)
        leaves = [value for value in (*arguments, *layer.parameters()) if _needs_gradient(value)]
        # Not into `grad` of the weights: hooks take what comes there for a step's.
        with torch_explained():
            torch.autograd.grad(layer(*arguments).sum(), leaves)
    except MemoryError:
        raise
    except Exception as failure:
        return " ".join(str(failure).split())[:300] or type(failure).__name__
    return ""


def _needs_gradient(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compute without compiled code: other shapes, as of an evaluation, would be compiled, too."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None:
        # Before torch 2.6.
        yield
        return
    with set_stance("force_eager"):
        yield
