"""Attention of many texts at once, whose keys and values are in pages (Kwon et al. 2023).

A step has N positions of many rows: first those of rows with one new position, which decode, then
each longer row. All are a batch (N, 1, C), so that every other layer computes them in one product.

Shapes: N positions, M decoding rows, P pages of S positions, L positions attended to, H heads, K
heads of keys and values, D width of a head, G query heads of one head of keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mpillm.errors import UsageError
from mpillm.models.block_settings import BlockSettings
from mpillm.models.layers.dense_attention import attend_dense
from mpillm.models.layers.unfused_attention import attend_unfused
from mpillm.models.layers.window_attention import attend_window, band_mask
from mpillm.models.part_module import GenerationCache

# Rows that decode are padded to the longest one of their group. A group of its own costs four
# kernels a layer, as much as 64 positions that are gathered and masked.
PADDED_POSITIONS = 64


@dataclass(frozen=True)
class PagedRow:
    """The new positions of a text: how many, after how many, and the pages of all of them."""

    first: int
    count: int
    pages: Sequence[int]


class _Group(NamedTuple):
    """Rows that decode, numbers `first` to `last` − 1, and what they attend to."""

    first: int
    last: int
    pages: "Tensor | slice"
    """Those of all rows, (M · pages of a row); a slice where they follow each other in memory."""
    length: int
    mask_ML: Tensor | None
    """True where a row attends; None: everywhere."""


class _RowChunk(NamedTuple):
    """Consecutive positions of one row, at places `start` to `stop` − 1 of the step."""

    start: int
    stop: int
    pages: "Tensor | slice | None"
    """None: the row begins here, and attends to nothing else."""
    offset: int
    """The positions attended to ahead of the first new one."""


class _Gathering(NamedTuple):
    groups: list[_Group]
    chunks: list[_RowChunk]


class PagedStep:
    """Where the keys of a step's positions go, and what each attends to. The same for all layers.

    `rows`: those that decode first, the longest one ahead. `page_positions`: S.
    """

    def __init__(self, rows: Sequence[PagedRow], page_positions: int, device: torch.device) -> None:
        self._rows, self._size, self._device = rows, page_positions, device
        self._decoding = sum(1 for row in rows if row.count == 1 and row.first)
        assert all(row.count == 1 and row.first for row in rows[: self._decoding])
        positions = [row.first + place for row in rows for place in range(row.count)]
        slots = [
            row.pages[position // page_positions] * page_positions + position % page_positions
            for row in rows
            for position in range(row.first, row.first + row.count)
        ]
        self.positions_N1 = torch.tensor(positions, device=device)[:, None]
        self.slots_N = torch.tensor(slots, device=device)
        begun = [page for row in rows for page in self._begun(row)]
        self.begun = torch.tensor(begun, device=device) if begun else None
        """The pages that the step begins and does not fill."""
        self._by_window: dict[int, _Gathering] = {}

    def _begun(self, row: PagedRow) -> Sequence[int]:
        last = (row.first + row.count) // self._size
        is_begun = row.first <= last * self._size < row.first + row.count
        return row.pages[last : last + 1] if is_begun else ()

    def gathering(self, window: int) -> _Gathering:
        """Return what layers with such a window gather (0: all positions)."""
        if window not in self._by_window:
            self._by_window[window] = _Gathering(self._groups(window), self._chunks(window))
        return self._by_window[window]

    def _groups(self, window: int) -> list[_Group]:
        rows, size = self._rows[: self._decoding], self._size
        begins = [max(0, row.first + 1 - window) // size if window else 0 for row in rows]
        counts = [row.first // size + 1 - begin for row, begin in zip(rows, begins, strict=True)]
        groups, first = [], 0
        while first < len(rows):
            most, last = counts[first], first + 1
            while last < len(rows) and 0 <= most - counts[last] <= PADDED_POSITIONS // size:
                last += 1
            groups.append(self._group(first, last, begins, most, window))
            first = last
        return groups

    def _group(self, first: int, last: int, begins: list[int], most: int, window: int) -> _Group:
        size, rows = self._size, self._rows[first:last]
        pages, spans = [], []
        for row, begin in zip(rows, begins[first:last], strict=True):
            own = list(row.pages[begin : begin + most])
            # Any page will do where a row has fewer: it is masked.
            pages += own + own[-1:] * (most - len(own))
            start = max(0, row.first + 1 - window) if window else 0
            spans.append((start - begin * size, row.first + 1 - begin * size))
        length = max(stop for _, stop in spans)
        mask_ML = None
        if any(span != (0, length) for span in spans):
            starts_M1, stops_M1 = torch.tensor(spans, device=self._device).t()[..., None]
            places_L = torch.arange(length, device=self._device)
            mask_ML = (places_L >= starts_M1) & (places_L < stops_M1)
        return _Group(first, last, self._index(pages), length, mask_ML)

    def _chunks(self, window: int) -> list[_RowChunk]:
        chunks, start, size = [], self._decoding, self._size
        for row in self._rows[self._decoding :]:
            stop = start + row.count
            if not row.first:
                chunks.append(_RowChunk(start, stop, None, 0))
            else:
                begin = max(0, row.first + 1 - window) // size if window else 0
                pages = list(row.pages[begin : (row.first + row.count - 1) // size + 1])
                chunks.append(_RowChunk(start, stop, self._index(pages), row.first - begin * size))
            start = stop
        return chunks

    def _index(self, pages: list[int]) -> "Tensor | slice":
        first = pages[0]
        if pages == list(range(first, first + len(pages))):
            # A view: nothing is copied.
            return slice(first, first + len(pages))
        return torch.tensor(pages, device=self._device)


class PagedLayer:
    """The pages of one layer: keys and values (P, S, K · D)."""

    def __init__(self, cache: "PagedCache", heads: int, width: int, dtype: torch.dtype) -> None:
        self._cache, self._by_head = cache, (heads, width)
        shape = (cache.pages, cache.page_positions, heads * width)
        # Zeros: what is masked is multiplied by 0, and must be finite.
        self._k_PSW = torch.zeros(shape, dtype=dtype, device=cache.device)
        self._v_PSW = torch.zeros(shape, dtype=dtype, device=cache.device)

    @property
    def step(self) -> PagedStep:
        return self._cache.step

    def store(self, k_N1KD: Tensor, v_N1KD: Tensor) -> None:
        """Store the keys and values of the step's positions."""
        for pages_PSW, own in ((self._k_PSW, k_N1KD), (self._v_PSW, v_N1KD)):
            if self.step.begun is not None:
                # An earlier text may have left what is not finite, and 0 · NaN is not 0.
                pages_PSW.index_fill_(0, self.step.begun, 0)
            pages_PSW.flatten(0, 1).index_copy_(0, self.step.slots_N, own.flatten(1))

    def gather(self, pages: "Tensor | slice", rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Return keys and values (M, L, K, D) of the first `length` positions of `rows`' pages."""
        k_MLKD, v_MLKD = (
            (each[pages] if isinstance(pages, slice) else each.index_select(0, pages))
            .view(rows, -1, *self._by_head)
            .narrow(1, 0, length)
            for each in (self._k_PSW, self._v_PSW)
        )
        return k_MLKD, v_MLKD


class PagedCache(GenerationCache):
    """The pages of the layers of a part, and the step that is computed."""

    def __init__(
        self,
        config: BlockSettings,
        blocks: Sequence[int],
        pages: int,
        page_positions: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        key_value_heads: int = 0,
    ) -> None:
        """Make the pages of `blocks`; `key_value_heads`: of this rank, 0: all.

        Raises UsageError where the architecture's positions are no tokens' own.
        """
        check_paged(config)
        self.pages, self.page_positions, self.device = pages, page_positions, device
        heads = key_value_heads or config.key_value_heads
        given = heads, config.head_features, dtype
        self.layers: Mapping[int, PagedLayer] = {n: PagedLayer(self, *given) for n in blocks}
        self.lengths_B: Tensor | None = torch.zeros(0, dtype=torch.int64, device=device)
        """Not None: each row of a batch has a length of its own."""
        self._step: PagedStep | None = None

    @property
    def step(self) -> PagedStep:
        assert self._step is not None, "a step begins ahead of its pass"
        return self._step

    def begin(self, rows: Sequence[PagedRow]) -> PagedStep:
        """Begin a step of the positions of `rows`: those that decode first."""
        self._step = PagedStep(rows, self.page_positions, self.device)
        return self._step

    def places(self, length: int) -> Tensor:
        """Return the positions (N, 1) of the step in their rows."""
        assert length == 1, "positions of a step are a batch"
        return self.step.positions_N1

    def grow(self, positions: int) -> None:
        """Do nothing: rank 0 counts the positions of each row."""

    @property
    def nbytes(self) -> int:
        """The bytes of all pages."""
        return sum(2 * layer._k_PSW.nbytes for layer in self.layers.values())


def check_paged(config: BlockSettings) -> None:
    """Raise UsageError unless the layers of such a model can have their keys in pages."""
    if config.positions == "relative":
        raise UsageError(
            'a model with positions = "relative" has biases of distances, which are not computed '
            "in pages; generate with it by `mpillm generate`"
        )


def attend_paged(
    q_N1HD: Tensor,
    k_N1KD: Tensor,
    v_N1KD: Tensor,
    layer: PagedLayer,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Store the positions of a step and attend from each within its row; return (N, 1, H, D)."""
    layer.store(k_N1KD, v_N1KD)
    groups, chunks = layer.step.gathering(window)
    parts = [_attend_group(q_N1HD, layer, group, soft_cap) for group in groups]
    for chunk in chunks:
        parts.append(_attend_chunk(q_N1HD, k_N1KD, v_N1KD, layer, chunk, window, soft_cap))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_group(q_N1HD: Tensor, layer: PagedLayer, group: _Group, soft_cap: float) -> Tensor:
    """Attend from the newest position of rows; return (M, 1, H, D)."""
    q_M1HD = q_N1HD[group.first : group.last]
    k_MLKD, v_MLKD = layer.gather(group.pages, len(q_M1HD), group.length)
    mask = None if group.mask_ML is None else group.mask_ML[:, None, None]
    if soft_cap:
        return attend_unfused(q_M1HD, k_MLKD, v_MLKD, mask, soft_cap)
    # The query heads of one head of keys are positions: all attend to the same keys.
    by_keys = (len(q_M1HD), k_MLKD.shape[2], -1, q_M1HD.shape[-1])
    q_MGKD = q_M1HD.reshape(by_keys).transpose(1, 2)
    a_MGKD = attend_dense(q_MGKD, k_MLKD, v_MLKD, mask, causal=False)
    return a_MGKD.transpose(1, 2).reshape(q_M1HD.shape)


def _attend_chunk(
    q_N1HD: Tensor,
    k_N1KD: Tensor,
    v_N1KD: Tensor,
    layer: PagedLayer,
    chunk: _RowChunk,
    window: int,
    soft_cap: float,
) -> Tensor:
    """Attend from consecutive positions of a row; return (T, 1, H, D)."""
    own = slice(chunk.start, chunk.stop)
    q_1THD, length = q_N1HD[own].transpose(0, 1), chunk.stop - chunk.start
    if chunk.pages is None:
        k_1LKD, v_1LKD = k_N1KD[own].transpose(0, 1), v_N1KD[own].transpose(0, 1)
        if not soft_cap:
            return attend_window(q_1THD, k_1LKD, v_1LKD, window).transpose(0, 1)
    else:
        k_1LKD, v_1LKD = layer.gather(chunk.pages, 1, chunk.offset + length)
    mask_TL = band_mask(length, chunk.offset, window, q_1THD.device)
    if soft_cap:
        return attend_unfused(q_1THD, k_1LKD, v_1LKD, mask_TL, soft_cap).transpose(0, 1)
    return attend_dense(q_1THD, k_1LKD, v_1LKD, mask_TL).transpose(0, 1)
