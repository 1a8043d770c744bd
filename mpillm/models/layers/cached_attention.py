"""Attention of generation: new positions attend to themselves and to those in a cache.

Shapes: B sequences, T positions, S positions attended to, H heads, K heads of keys and values, D
width of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mpillm.models.block_settings import BlockSettings
from mpillm.models.layers.dense_attention import attend_dense, biased_mask
from mpillm.models.layers.unfused_attention import attend_unfused
from mpillm.models.layers.window_attention import attend_window, band_mask
from mpillm.models.part_module import GenerationCache

# A layer's tensors have room for so many positions at first, then for twice as many each time: a
# context may be a hundred times longer than a text.
FIRST_POSITIONS = 64


class LayerCache:
    """Keys and values of one layer for the past positions: two tensors (B, K, positions, D)."""

    def __init__(
        self, config: BlockSettings, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._context = config.context
        positions = min(FIRST_POSITIONS, config.context)
        shape = (batch, config.key_value_heads, positions, config.head_features)
        # By head: a new position reads the keys of a head in one piece.
        self._k_BKSD = torch.zeros(shape, device=device, dtype=dtype)
        self._v_BKSD = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths_B: Tensor | None = None
        """The past positions of each row, where rows have unequally many."""

    def extend(self, k_BTKD: Tensor, v_BTKD: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Store T new positions from `first` on and return all positions, (B, S, K, D).

        Unequal rows have them after their own, and `first` is the largest of their lengths.
        """
        length = k_BTKD.shape[1]
        last = first + length
        self._make_room(last)
        if self.lengths_B is None:
            self._k_BKSD[:, :, first:last] = k_BTKD.transpose(1, 2)
            self._v_BKSD[:, :, first:last] = v_BTKD.transpose(1, 2)
        else:
            rows_B1 = torch.arange(len(k_BTKD), device=k_BTKD.device)[:, None]
            places_BT = places_after(self.lengths_B, length)
            self._k_BKSD[rows_B1, :, places_BT] = k_BTKD
            self._v_BKSD[rows_B1, :, places_BT] = v_BTKD
        k_BKSD, v_BKSD = self._k_BKSD[:, :, :last], self._v_BKSD[:, :, :last]
        return k_BKSD.transpose(1, 2), v_BKSD.transpose(1, 2)

    def mask(self, length: int, first: int, window: int) -> Tensor:
        """Make the mask (B, 1, T, S) of `length` new positions of unequal rows: true where each
        attends. The rest: see `extend`.
        """
        assert self.lengths_B is not None
        places_BT1 = places_after(self.lengths_B, length)[..., None]
        keys_S = torch.arange(first + length, device=places_BT1.device)
        mask_BTS = keys_S <= places_BT1
        if window:
            mask_BTS &= keys_S > places_BT1 - window
        return mask_BTS[:, None]

    def select(self, rows_N: Tensor) -> None:
        """Keep the rows with these numbers, in this order; one may be there several times."""
        self._k_BKSD, self._v_BKSD = self._k_BKSD[rows_N], self._v_BKSD[rows_N]

    def _make_room(self, last: int) -> None:
        room = self._k_BKSD.shape[2]
        if last <= room:
            return
        more = max(min(2 * room, self._context), last) - room
        # Zeros: what is masked is multiplied by 0, and must be finite.
        self._k_BKSD, self._v_BKSD = (
            F.pad(each, (0, 0, 0, more)) for each in (self._k_BKSD, self._v_BKSD)
        )


class LayeredCache(GenerationCache):
    """The caches of all layers, which hold the same positions."""

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        self.layers, self.length = layers, 0
        self.lengths_B: Tensor | None = None
        """The positions of each row, where rows have unequally many."""

    def grow(self, positions: int) -> None:
        """Count positions that all layers have stored."""
        if self.lengths_B is None:
            self.length += positions
        else:
            self.cut(self.lengths_B + positions)

    def places(self, length: int) -> Tensor | None:
        """Return the positions (B, T) of `length` new ones of unequal rows; None of equal ones."""
        return None if self.lengths_B is None else places_after(self.lengths_B, length)

    def cut(self, lengths_B: Tensor) -> None:
        self.length = int(lengths_B.max())
        equal = int(lengths_B.min()) == self.length
        self.lengths_B = None if equal else lengths_B
        for layer in self.layers:
            layer.lengths_B = self.lengths_B

    def select(self, rows_N: Tensor) -> None:
        for layer in self.layers:
            layer.select(rows_N)
        if self.lengths_B is not None:
            self.cut(self.lengths_B[rows_N])


def places_after(lengths_B: Tensor, count: int) -> Tensor:
    """Return the `count` positions of each row after its own, (B, T)."""
    return lengths_B[:, None] + torch.arange(count, device=lengths_B.device)


def attend_cached(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    cache: LayerCache,
    first: int,
    window: int = 0,
    soft_cap: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Store the new positions, which begin at `first`, and attend from them; return (B, T, H, D).

    Keys are cached after rotation: their positions never change. The rest: see attention.py.
    """
    k_BSKD, v_BSKD = cache.extend(k_BTKD, v_BTKD, first)
    length = q_BTHD.shape[1]
    if cache.lengths_B is not None:
        assert bias is None, "relative positions of unequal rows are not needed"
        mask = cache.mask(length, first, window)
        if soft_cap:
            return attend_unfused(q_BTHD, k_BSKD, v_BSKD, mask, soft_cap)
        return attend_dense(q_BTHD, k_BSKD, v_BSKD, mask)
    if soft_cap:
        mask_TS = band_mask(length, first, window, q_BTHD.device)
        return attend_unfused(q_BTHD, k_BSKD, v_BSKD, mask_TS, soft_cap, bias=bias)
    if bias is not None:
        mask_TS = band_mask(length, first, window, q_BTHD.device)
        return attend_dense(q_BTHD, k_BSKD, v_BSKD, biased_mask(bias.to(q_BTHD.dtype), mask_TS))
    if not first:
        return attend_window(q_BTHD, k_BSKD, v_BSKD, window)
    if length == 1:
        # The slice of one position is its window; -0 is all.
        return attend_dense(q_BTHD, k_BSKD[:, -window:], v_BSKD[:, -window:])
    return attend_dense(q_BTHD, k_BSKD, v_BSKD, band_mask(length, first, window, q_BTHD.device))
