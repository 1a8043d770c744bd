"""The base of both kinds of attention over sequences whose positions ranks share.

Shapes: B sequences, T positions of a rank, H heads, K heads of keys and values, D width of a head.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from mpillm.comm.mesh import Axis
from mpillm.models.layers.attention import CAUSAL, Pattern
from mpillm.models.layers.document_spans import DocumentSpans


class RankAttention(ABC):
    """The attention of one rank, for all layers of its parts. Every rank of `axis` makes it.

    All ranks attend in the same order, with sequences of the same shapes.
    """

    def __init__(self, axis: Axis) -> None:
        self.rank, self.ranks = axis.rank, axis.size
        self.length = 0
        """Positions of the whole sequences that are computed; 0: as many as each rank has, each."""

    def attend(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        pattern: Pattern = CAUSAL,
        spans: DocumentSpans | None = None,
        cache: None = None,
        first: int = 0,
        keys: object = None,
        bias: None = None,
    ) -> Tensor:
        """Attend as `models.layers.attention.attend` does, over all ranks; return (B, T, H, D).

        `spans`: of the whole sequences.
        """
        assert (cache, bias) == (None, None), "ranks share whole sequences without a bias"
        length = self.length or self.ranks * q_BTHD.shape[1]
        return self.attend_over(q_BTHD, k_BTKD, v_BTKD, pattern, spans, length)

    @abstractmethod
    def attend_over(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        pattern: Pattern,
        spans: DocumentSpans | None,
        length: int,
    ) -> Tensor:
        """Attend with the own queries to all `length` positions of the sequences."""

    @abstractmethod
    def close(self) -> None:
        """Free shared memory and communicators. Every rank of the axis calls it, last."""
