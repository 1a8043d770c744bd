"""The spans of documents in the rows of a batch: a position attends within its own document.

Shapes: B sequences, T positions, N documents.
"""

from functools import cached_property
from itertools import groupby, pairwise

import torch
from torch import Tensor


class DocumentSpans:
    """Where the documents of B rows begin and end; each form of it is made once, when it is read.

    The spans are known on the host, so nothing waits for a GPU. All layers of a forward pass share
    them.
    """

    def __init__(self, document_BT: Tensor, device: torch.device | None = None) -> None:
        """Find the spans. `document_BT` numbers each position's document, best in host memory.

        Positions in a row with one number are a document. `device`: of the attention; None: the
        CPU.
        """
        numbers_BT = document_BT.cpu()
        begins_BT = torch.ones(numbers_BT.shape, dtype=torch.bool)
        begins_BT[:, 1:] = numbers_BT[:, 1:] != numbers_BT[:, :-1]
        self._begins_BT, self._device = begins_BT, device or torch.device("cpu")
        starts: list[int] = begins_BT.flatten().nonzero().flatten().tolist()
        self.edges = (*starts, begins_BT.numel())
        """Of all rows in a row: document n has the positions `edges[n]` to `edges[n + 1]` − 1."""

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Positions of each document, row by row."""
        return tuple(last - first for first, last in pairwise(self.edges))

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Documents of equal length that follow each other: (how many, their length)."""
        return tuple((len(list(group)), length) for length, group in groupby(self.lengths))

    @cached_property
    def firsts(self) -> Tensor:
        """The first position (B, T) of each position's document, in host memory."""
        places_T = torch.arange(self._begins_BT.shape[1])
        # The last begin so far.
        return torch.where(self._begins_BT, places_T, 0).cummax(1).values

    @cached_property
    def places(self) -> Tensor:
        """The place (B, T) of each position in its document, on the device."""
        return self._sent(torch.arange(self._begins_BT.shape[1]) - self.firsts)

    @cached_property
    def lasts(self) -> Tensor:
        """The position (B, T) after each position's document, in host memory."""
        length = self._begins_BT.shape[1]
        places_BT = torch.arange(length).where(self._begins_BT, length)
        # The first begin from the next position on.
        ends_BT = places_BT.flip(1).cummin(1).values.flip(1)[:, 1:]
        return torch.nn.functional.pad(ends_BT, (0, 1), value=length)

    @cached_property
    def edges_on_device(self) -> Tensor:
        """The edges as int32 on the device, as kernels for variable lengths take them."""
        return self._sent(torch.tensor(self.edges, dtype=torch.int32))

    @cached_property
    def mask(self) -> Tensor:
        """The mask (B, 1, T, T): true where both positions are of one document."""
        numbers_BT = self._sent(self._begins_BT.long().cumsum(1))
        return (numbers_BT[:, :, None] == numbers_BT[:, None, :])[:, None]

    @cached_property
    def causal_mask(self) -> Tensor:
        """The same mask without the positions to come."""
        return self.mask.tril()

    def _sent(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor.to(self._device)
        # From pinned memory the copy does not wait for the work that the GPU has.
        return tensor.pin_memory().to(self._device, non_blocking=True)
