"""Ring attention (Liu et al. 2023): exact attention of sequences whose positions ranks share.

Each rank attends with its own queries to the keys and values of all ranks, block by block, and
joins the blocks by online softmax. Backward it computes each block again. In a step each rank of a
node adds to the gradients of another rank, so that no two write to one place, and the order of sums
is always the same.

Shapes: B sequences, T positions of a rank, S of the source of a block, H heads, K heads of keys and
values, D width of a head.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpillm.comm.communicator import silent
from mpillm.comm.mesh import Axis
from mpillm.comm.selection import Profile
from mpillm.models.layers.attention import Pattern
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.parallel.context.block_kernel import JoinedPieces, Piece, piece_gradients
from mpillm.parallel.context.rank_attention import RankAttention
from mpillm.parallel.context.ring_memory import RingMemory
from mpillm.parallel.context.ring_pieces import make_pieces
from mpillm.parallel.context.ring_steps import step_of
from mpillm.parallel.context.ring_visits import FoundGradients, GradientSums, visits


class Ring(RankAttention):
    """The ring of one rank.

    `numbers`: of the largest keys and values of a rank, of elements of `itemsize` bytes. `shares`:
    whether the ranks of a node may share memory. `profile`, `debug`, `warn`: as in Communicator.
    """

    def __init__(
        self,
        axis: Axis,
        numbers: int,
        itemsize: int,
        *,
        shares: bool = True,
        profile: Profile | None = None,
        debug: bool = False,
        warn: Callable[[str], None] = silent,
    ) -> None:
        super().__init__(axis)
        self.memory = RingMemory(
            axis,
            numbers * itemsize,
            numbers,
            shares=shares,
            profile=profile,
            debug=debug,
            warn=warn,
        )
        self._pieces: WeakKeyDictionary[DocumentSpans, dict[Any, list[Piece]]]
        self._pieces = WeakKeyDictionary()
        self._plain: dict[Any, list[Piece]] = {}
        self._plain_length = 0

    def attend_over(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        pattern: Pattern,
        spans: DocumentSpans | None,
        length: int,
    ) -> Tensor:
        out: Tensor = _RingAttention.apply(  # type: ignore[no-untyped-call]
            q_BTHD, k_BTKD, v_BTKD, self, pattern, spans, length
        )
        return out

    def pieces(
        self, source: int, pattern: Pattern, spans: DocumentSpans | None, length: int
    ) -> list[Piece]:
        """Return the pieces of the step with the keys of `source`, made once for all layers."""
        if spans is None and length != self._plain_length:
            # An evaluation has rows of many lengths, and a mask grows by the square of one.
            self._plain.clear()
            self._plain_length = length
        known = self._plain if spans is None else self._pieces.setdefault(spans, {})
        key = source, pattern, length
        if key not in known:
            step = step_of(self.rank, source, pattern.causal)
            known[key] = make_pieces(step, self.rank, self.ranks, length, pattern, spans)
        return known[key]

    def close(self) -> None:
        self.memory.close()


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        ring: Ring,
        pattern: Pattern,
        spans: DocumentSpans | None,
        length: int,
    ) -> Tensor:
        q_BHTD = q_BTHD.transpose(1, 2)
        joined = JoinedPieces(q_BHTD)
        for source, _, k_BKSD, v_BKSD in visits(ring.memory, k_BTKD, v_BTKD, length):
            for piece in ring.pieces(source, pattern, spans, length):
                joined.add(k_BKSD, v_BKSD, piece, pattern.soft_cap)
        out_BHTD, sums_BHT = joined.result()
        ctx.save_for_backward(q_BTHD, k_BTKD, v_BTKD, out_BHTD, sums_BHT)
        ctx.given = ring, pattern, spans, length
        return out_BHTD.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHD, k_BTKD, v_BTKD, out_BHTD, sums_BHT = ctx.saved_tensors
        ring, pattern, spans, length = ctx.given
        own = grad_BTHD.contiguous().transpose(1, 2), q_BTHD.transpose(1, 2), out_BHTD, sums_BHT
        block = _BlockGradients(own, k_BTKD.shape[2], pattern.soft_cap)
        sums = GradientSums(ring.memory, k_BTKD, length)
        heads, late = _late_heads(k_BTKD.shape[2], len(ring.memory.nodes))
        every = slice(0, k_BTKD.shape[2])
        for source, place, k_BKSD, v_BKSD in visits(ring.memory, k_BTKD, v_BTKD, length):
            pieces = ring.pieces(source, pattern, spans, length)
            now = heads if source == ring.rank else every
            sums.add(source, place, block.of(k_BKSD, v_BKSD, pieces, now))
        if late is not None:
            k_BKTD, v_BKTD = k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)
            pieces = ring.pieces(ring.rank, pattern, spans, length)
            sums.add_own(block.of(k_BKTD, v_BKTD, pieces, late))
        dk_BTKD, dv_BTKD = (each.to(k_BTKD.dtype) for each in sums.brought_home())
        dq_BTHD = block.dq_BHTD.transpose(1, 2).to(q_BTHD.dtype)
        return dq_BTHD, dk_BTKD, dv_BTKD, None, None, None, None


def _late_heads(heads: int, nodes: int) -> tuple[slice, slice | None]:
    """Return which heads of a rank's own keys a backward pass computes first, and which last.

    The last ones are computed while sums of gradients pass home from the node before. None where
    nothing passes, or a rank has one head.
    """
    late = heads // 2 if nodes > 1 else 0
    return slice(0, heads - late), slice(heads - late, heads) if late else None


class _BlockGradients:
    """The gradients of one rank's queries, block of keys by block.

    `own`: the gradient, the queries, the output (B, H, T, D) and the sums (B, H, T) of this rank.
    """

    def __init__(self, own: tuple[Tensor, ...], kv_heads: int, soft_cap: float) -> None:
        self._own, self._soft_cap = own, soft_cap
        _, q_BHTD, *_ = own
        self._group = q_BHTD.shape[1] // kv_heads
        # In float32, as are the sums over ranks: many blocks are added.
        self.dq_BHTD = torch.zeros(q_BHTD.transpose(1, 2).shape).transpose(1, 2)

    def of(
        self, k_BKSD: Tensor, v_BKSD: Tensor, pieces: Sequence[Piece], heads: slice
    ) -> list[FoundGradients]:
        """Add to the gradient of queries; return those of a block's keys and values, by piece.

        `heads`: which heads of keys and values, with the queries that share them.
        """
        queries = slice(heads.start * self._group, heads.stop * self._group)
        found = []
        for piece in pieces:
            rows, keys = piece.queries, piece.keys
            grad, q, out, sums = (x[:, queries, rows] for x in self._own)
            given = grad, q, k_BKSD[:, heads, keys], v_BKSD[:, heads, keys], out, sums
            dq, dk, dv = piece_gradients(*given, piece, self._soft_cap)
            self.dq_BHTD[:, queries, rows] += dq
            found.append(FoundGradients(heads, keys, dk, dv))
        return found
