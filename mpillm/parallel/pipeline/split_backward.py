"""A backward pass in two halves: the gradient of a stage's input first, the gradients of its weights later.

The zero-bubble schedules (Qi, Wan, Huang, Lin, "Zero bubble pipeline parallelism", ICLR 2024) send the first half on at
once and fill idle time with the second. Autograd takes a graph apart so: on the way from the output to the input lie
nodes, such as a matrix product, from which a branch leads to weights alone. The first half runs along the way and notes
the gradient that each such node is given; the second starts at these nodes, and goes down their branches only. Each
product is computed once, by the same operations on the same numbers as in one whole pass, so the bits are the same.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Gradients = tuple[Tensor | None, ...]


class SplitBackward:
    """The backward pass of `output`, which was computed from `pivot`: what the first half is to reach.

    `pivot` is the stage's input, a leaf; for a stage that begins the model it is the embedding's output. No weight may
    be used in two places: of a tied head and embedding one must be another leaf (tying.py).
    """

    def __init__(self, output: Tensor, pivot: Tensor) -> None:
        self._output, self._pivot = output, pivot
        self._end = get_gradient_edge(pivot).node
        self._noted: dict[Node, Gradients] = {}
        self._branches = dict(_branches(output, self._end))
        # Hooks that know the dictionary alone: one that held this object would make a circle with its graph.
        self._hooks = [node.register_prehook(_note(self._noted, node)) for node in self._branches]

    def input(self, gradient: Tensor | None) -> Tensor:
        """The gradient of `pivot`; `gradient` is that of the output, None for a scalar loss."""
        (found,) = torch.autograd.grad(self._output, self._pivot, gradient, retain_graph=True)
        for hook in self._hooks:
            hook.remove()
        # Autograd stops at the pivot, before the node that made it.
        self._noted[self._end] = (found,)
        return found

    def weights(self) -> None:
        """Accumulate `grad` of all weights. Afterwards the graph is gone."""
        for node, leaves in self._branches.items():
            given = [
                (place, gradient)
                for place, gradient in enumerate(self._noted[node])
                if gradient is not None
            ]
            edges = [GradientEdge(node, place) for place, _ in given]
            torch.autograd.backward(edges, [gradient for _, gradient in given], inputs=leaves)
            del self._noted[node]
        self._branches.clear()
        self._noted.clear()


def _note(noted: dict[Node, Gradients], node: Node) -> Any:
    def hook(gradients: Gradients) -> None:
        noted[node] = gradients

    return hook


def _branches(output: Tensor, pivot: Node) -> Iterator[tuple[Node, list[Tensor]]]:
    """Each node on the way from `output` to `pivot` from which weights are reached otherwise, with those weights;
    `pivot` too, if it is no leaf.
    """
    assert output.grad_fn is not None
    order = _children_first(output.grad_fn)
    on_the_way = {pivot}
    for node in order:
        if node is not pivot and any(child in on_the_way for child in _children(node)):
            on_the_way.add(node)
    for node in order:
        if node in on_the_way:
            leaves = [
                leaf
                for child in _children(node)
                if child not in on_the_way
                for leaf in _leaves(child)
            ]
            if leaves:
                yield node, list(dict.fromkeys(leaves))


def _children(node: Node) -> list[Node]:
    return [child for child, _ in node.next_functions if child is not None]


def _children_first(root: Node) -> list[Node]:
    """All nodes below `root`, each behind those that it hands gradients to. A loop: graphs are deeper than Python's
    stack.
    """
    order: list[Node] = []
    seen, stack = {root}, [(root, iter(_children(root)))]
    while stack:
        node, children = stack[-1]
        child = next((child for child in children if child not in seen), None)
        if child is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(child)
            stack.append((child, iter(_children(child))))
    return order


def _leaves(node: Node) -> list[Tensor]:
    """The weights below a node of a branch."""
    return [below.variable for below in _children_first(node) if hasattr(below, "variable")]
