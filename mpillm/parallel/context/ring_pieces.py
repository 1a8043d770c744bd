"""The pieces of a step of ring attention: what one call of a kernel computes, and its mask.

Without window and documents a step is one piece. Else queries are cut into tiles. Keys that no
query of a tile attends to are left out, and a mask is made only where a window or the end of a
document cuts the rest.

Shapes: B sequences, T positions, S positions attended to.
"""

import torch
from torch import Tensor

from mpillm.models.layers.attention import Pattern
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.parallel.context.block_kernel import Piece
from mpillm.parallel.context.ring_steps import RingStep
from mpillm.parallel.context.zigzag import Range, own_spans

# Queries of a tile: enough for a kernel's own blocks, few against a window or a document.
TILE = 256


def make_pieces(
    step: RingStep,
    rank: int,
    ranks: int,
    length: int,
    pattern: Pattern,
    spans: DocumentSpans | None = None,
) -> list[Piece]:
    """Return the pieces of a step of `rank`, for whole sequences of `length` positions.

    Slices count the positions as the rank, and the source, hold them.
    """
    own, theirs = own_spans(rank, ranks, length), own_spans(step.source, ranks, length)
    if not pattern.window and spans is None:
        queries, keys = _joined(own, step.queries), _joined(theirs, step.keys)
        found = [Piece(queries, keys, step.causal)]
    else:
        masks = _Masks(pattern, spans)
        found = [
            piece
            for query in step.queries
            for tile in _tiles(own[query])
            for key in step.keys
            for piece in masks.pieces(tile, theirs[key], _start(own, query), _start(theirs, key))
        ]
    return [piece for piece in found if _size(piece.queries) and _size(piece.keys)]


class _Masks:
    """The masks of one pattern, and of one batch's documents."""

    def __init__(self, pattern: Pattern, spans: DocumentSpans | None) -> None:
        self._causal = pattern.causal
        size = pattern.window
        # Positions attended to on each side of one; None: any number.
        self._back = (size - 1 if pattern.causal else size // 2) if size else None
        self._ahead = 0 if pattern.causal else self._back
        self._bounds_BT = None if spans is None else (spans.firsts, spans.lasts)

    def pieces(self, tile: Range, keys: Range, query_start: int, key_start: int) -> list[Piece]:
        """Return the piece of a tile and a chunk of keys, none where no query attends to a key.

        The tile's chunk, and the keys, begin at `query_start` and `key_start` of what is held.
        """
        first, last = self._reach(tile)
        begin, end = max(keys[0], first), min(keys[1], last)
        if begin >= end:
            return []
        mask = self._mask(tile, (begin, end))
        if mask is not None and not mask.any():
            return []
        return [
            Piece(
                slice(tile[0] + query_start, tile[1] + query_start),
                slice(begin + key_start, end + key_start),
                False,
                None if mask is None or bool(mask.all()) else mask,
            )
        ]

    def _reach(self, tile: Range) -> Range:
        """Return the keys that any query of a tile may attend to."""
        first, last = 0, 1 << 62
        if self._back is not None:
            first = tile[0] - self._back
        if self._ahead is not None:
            last = tile[1] + self._ahead
        if self._bounds_BT is not None:
            firsts_BT, lasts_BT = self._bounds_BT
            first = max(first, int(firsts_BT[:, tile[0]].min()))
            last = min(last, int(lasts_BT[:, tile[1] - 1].max()))
        return first, last

    def _mask(self, tile: Range, keys: Range) -> Tensor | None:
        """Return the mask of a piece, (T, S) or (B, 1, T, S); None where all attend to all."""
        queries_T1, keys_S = torch.arange(*tile)[:, None], torch.arange(*keys)
        mask: Tensor | None = None
        if self._ahead is not None and keys[1] - 1 > tile[0] + self._ahead:
            mask = keys_S <= queries_T1 + self._ahead
        if self._back is not None and keys[0] < tile[1] - 1 - self._back:
            near_TS = keys_S >= queries_T1 - self._back
            mask = near_TS if mask is None else mask & near_TS
        if self._bounds_BT is None:
            return mask
        firsts_BT, lasts_BT = (bounds[:, tile[0] : tile[1]] for bounds in self._bounds_BT)
        if int(firsts_BT.max()) <= keys[0] and int(lasts_BT.min()) >= keys[1]:
            return mask
        same_BTS = (keys_S >= firsts_BT[..., None]) & (keys_S < lasts_BT[..., None])
        return same_BTS[:, None] if mask is None else same_BTS[:, None] & mask


def _joined(spans: tuple[Range, Range], chunks: tuple[int, ...]) -> slice:
    """Return where the chunks, which follow each other, are in what a rank holds."""
    lengths = [stop - first for first, stop in spans]
    first = sum(lengths[: chunks[0]])
    return slice(first, first + sum(lengths[chunk] for chunk in chunks))


def _start(spans: tuple[Range, Range], chunk: int) -> int:
    """Return what is added to a position of a chunk for its place in what a rank holds."""
    return sum(stop - first for first, stop in spans[:chunk]) - spans[chunk][0]


def _tiles(span: Range) -> list[Range]:
    return [(first, min(first + TILE, span[1])) for first in range(span[0], span[1], TILE)]


def _size(part: slice) -> int:
    return int(part.stop - part.start)
