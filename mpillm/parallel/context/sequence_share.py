"""A rank's share of each sequence: its positions of a batch, and the attention to all positions."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpillm.comm.communicator import silent
from mpillm.comm.mesh import Axis
from mpillm.comm.selection import Profile
from mpillm.models.layers.attention import Attention
from mpillm.models.part_module import Fields, PartModule
from mpillm.parallel.context.context_traffic import choose_kind, own_heads
from mpillm.parallel.context.head_exchange import HeadExchange
from mpillm.parallel.context.rank_attention import RankAttention
from mpillm.parallel.context.ring_attention import Ring
from mpillm.parallel.context.zigzag import longest_length, own_length, own_positions
from mpillm.parallel.settings import ParallelSettings

# Fields that say what attends to what: each rank reads them for the whole sequence.
WHOLE_FIELDS = ("documents",)


class SequenceShare:
    """The positions of one rank of the context axis. Every rank of `axis` makes it, last of a
    model's building: the attentions of `parts` then attend over all ranks.
    """

    def __init__(
        self,
        axis: Axis,
        parts: Sequence[PartModule],
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: ParallelSettings,
        tensor: int = 1,
        profile: Profile | None = None,
        warn: Callable[[str], None] = silent,
    ) -> None:
        """`rows`: the most sequences at once. `dtype`: of keys and values. `tensor`: ranks that
        share the heads. `profile`, `warn`: as in Communicator.

        Raises LayoutError for a kind that the heads or the device do not allow.
        """
        self._rank, self._ranks, self._device = axis.rank, axis.size, device
        spec = parts[0].spec
        self._length = spec.context
        shape, debug = spec.attention_shape, settings.debug
        _, kv_heads, width = own_heads(shape, tensor)
        self.kind = choose_kind(settings.context_kind, axis.size, shape, tensor, device.type)
        self.attention: RankAttention
        if self.kind == "ring":
            numbers = 2 * rows * longest_length(axis.size, spec.context) * kv_heads * width
            self.attention = Ring(
                axis, numbers, dtype.itemsize, profile=profile, debug=debug, warn=warn
            )
        else:
            self.attention = HeadExchange(axis, profile=profile, debug=debug, warn=warn)
        for part in parts:
            for module in part.modules():
                if isinstance(module, Attention):
                    module.kernel = self.attention.attend

    def length(self, whole: int) -> int:
        """Return how many positions of sequences of `whole` positions are this rank's."""
        return own_length(self._rank, self._ranks, whole)

    def begin(self, whole: int = 0) -> None:
        """Announce the length of the sequences that are computed next; 0: the context."""
        self.attention.length = whole or self._length

    def deal(self, fields: Fields, whole: int = 0) -> dict[str, Tensor]:
        """Keep this rank's positions of the fields (B, T, …) of whole sequences.

        Fields of rows, and the documents, stay as they are.
        """
        whole = whole or self._length
        places_T = self._places(whole)
        return {
            name: field.index_select(1, places_T) if _is_dealt(name, field, whole) else field
            for name, field in fields.items()
        }

    def placed(self, whole: int = 0) -> dict[str, Tensor]:
        """Return the field `positions` (T,): the places in the row of this rank's positions."""
        return {"positions": self._places(whole or self._length).to(self._device)}

    def _places(self, whole: int) -> Tensor:
        return torch.from_numpy(own_positions(self._rank, self._ranks, whole))

    def close(self) -> None:
        """Free shared memory and communicators. Every rank of the axis calls it, last."""
        self.attention.close()


def _is_dealt(name: str, field: Tensor, whole: int) -> bool:
    return name not in WHOLE_FIELDS and field.dim() > 1 and field.shape[1] == whole
