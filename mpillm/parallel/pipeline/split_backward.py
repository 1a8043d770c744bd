"""Split a backward pass: the gradients of a stage's inputs first, those of its weights later.

The zero-bubble schedules (Qi, Wan, Huang, Lin, "Zero bubble pipeline parallelism", ICLR 2024) send
the input half at once and fill idle time with the weight half.

On the paths from the outputs to the inputs there are nodes of autograd's graph, such as a matrix
product, from which a branch leads to weights alone. The input half walks the paths and records the
gradient that each such node receives. The weight half starts from these nodes and walks their
branches only. Each product is computed once, by the same operations on the same numbers as in one
whole pass, so the bits are the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

# Output of a node → its gradient. A node may have several outputs, and a path may use some of them.
NodeGradients = dict[int, Tensor]


def _nothing(leaves: Sequence[Tensor]) -> None:
    """Do nothing ahead of the gradients of `leaves`."""


class SplitBackward:
    """The backward pass of `outputs`, which were computed from `pivots`, in two halves.

    The input half ends at the pivots: the streams that a stage received, which are leaves. On a
    stage that begins the model a pivot is the output of an embedding. A pivot is the only output of
    its operation, or all outputs in use are pivots. An output may be a pivot itself: a stream that
    passes through the stage.

    The bits are those of a whole pass while each weight is used in one place. A weight used in two
    places receives one addition for each. A head tied to the embedding on the same rank must be
    another leaf (tying.py).
    """

    def __init__(self, outputs: tuple[Tensor, ...], pivots: tuple[Tensor, ...]) -> None:
        self._outputs, self._pivots = outputs, pivots
        self._ends = [get_gradient_edge(pivot) for pivot in pivots]
        self._roots = [get_gradient_edge(output) for output in outputs]
        self._recorded: dict[Node, NodeGradients] = {}
        on_path, order = _paths([root.node for root in self._roots], [e.node for e in self._ends])
        self._branches = dict(_branches(on_path, order))
        self._aside = [
            number for number, root in enumerate(self._roots) if root.node not in on_path
        ]
        # The hooks capture the dictionary alone. A hook that captured `self` would close a cycle
        # with the graph, and keep the activations until the garbage collector runs.
        self._hooks = [
            node.register_prehook(_recorder(self._recorded, node)) for node in self._branches
        ]

    def input(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """Compute the gradient of each pivot; zeros for a pivot that no output depends on.

        `gradients` holds that of each output, None for a scalar loss.
        """
        # An output that depends on no pivot has nothing to do in this half.
        self._gradients_aside = [gradients[number] for number in self._aside]
        used = [number for number in range(len(self._outputs)) if number not in self._aside]
        if not self._pivots:
            # The embeddings are frozen: all is done in the weight half.
            return ()
        found = torch.autograd.grad(
            [self._outputs[number] for number in used],
            self._pivots,
            [gradients[number] for number in used],
            retain_graph=True,  # the weight half needs what the forward pass saved
            allow_unused=True,
            materialize_grads=True,
        )
        for hook in self._hooks:
            hook.remove()
        # Autograd stops at a pivot, before the node that made it: no hook has seen its gradient.
        for end, gradient in zip(self._ends, found, strict=True):
            self._recorded.setdefault(end.node, {})[end.output_nr] = gradient
        return found

    def weights(self, ahead: Callable[[Sequence[Tensor]], None] = _nothing) -> None:
        """Accumulate `grad` of all weights; frees the graph. Call it after `input`, once.

        `ahead` is called with the weights of each branch, before their gradients are computed.
        """
        for node, leaves in self._branches.items():
            ahead(leaves)
            received = self._recorded.pop(node)
            edges = [GradientEdge(node, place) for place in received]
            torch.autograd.backward(edges, list(received.values()), inputs=leaves)
        if self._aside:
            torch.autograd.backward(
                [self._outputs[number] for number in self._aside], self._gradients_aside
            )
        self._branches.clear()
        self._recorded.clear()


def _recorder(recorded: dict[Node, NodeGradients], node: Node) -> Any:
    """Make a hook that records the gradients that `node` receives, of the outputs that have one."""

    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        recorded[node] = {
            place: gradient for place, gradient in enumerate(gradients) if gradient is not None
        }

    return hook


def _paths(roots: list[Node], ends: list[Node]) -> tuple[set[Node], list[Node]]:
    """Find the nodes on paths from `roots` to `ends`; return them, and all nodes children first."""
    order = _children_first(roots)
    on_path = set(ends)
    # Children come first in `order`, so one pass decides for every node.
    for node in order:
        if any(child in on_path for child in _children(node)):
            on_path.add(node)
    return on_path, order


def _branches(on_path: set[Node], order: list[Node]) -> Iterator[tuple[Node, list[Tensor]]]:
    """Yield each node on a path from which a branch leads to weights alone, with these weights.

    A pivot that is not a leaf is such a node too.
    """
    for node in order:
        if node in on_path:
            leaves = [
                leaf for child in _children(node) if child not in on_path for leaf in _leaves(child)
            ]
            if leaves:
                # A weight reached by two edges of one node is one input of `backward`.
                yield node, list(dict.fromkeys(leaves))


def _children(node: Node) -> list[Node]:
    return [child for child, _ in node.next_functions if child is not None]


def _children_first(roots: Iterable[Node]) -> list[Node]:
    """List all nodes below `roots`, each after those that it passes gradients to."""
    # A loop with its own stack: graphs are deeper than Python's recursion limit.
    order: list[Node] = []
    seen: set[Node] = set()
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(_children(root)))]
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
    """List the weights below a node of a branch."""
    # Only AccumulateGrad, the node of a leaf, has a `variable`.
    return [below.variable for below in _children_first([node]) if hasattr(below, "variable")]
