"""How the weights of a part of the model are cut into shards: plain numbers, the same on all ranks.

Each rank owns one run of each weight, or some weights whole. Its runs in a row are its stream. All
ranks reduce the same stretch of their streams at a time: a unit (Rajbhandari et al., "ZeRO", SC
2020, section 5).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

# A row of a unit's gradients a rank is all that ZeRO needs above the shards: short units need
# little memory, long ones few collectives.
UNIT_BYTES = 8 << 20
# Runs begin on a cache line in float32, so that no two ranks write to one line.
LINE_ELEMENTS = 16
# Weights that an optimizer needs whole are dealt out in groups whose largest share is at most this
# much above the mean: small groups are complete early in the backward pass.
UNEVEN = 1.1


Deal = Literal["even", "whole", "first"]
"""A run to each shard; all of it to some shard; or all of it to the first one, wherever it is."""


@dataclass(frozen=True)
class Run:
    """The elements `first` to `first` + `count` − 1 of a flattened weight, at `offset` of a
    stream.
    """

    weight: int
    first: int
    count: int
    offset: int


class Unit(NamedTuple):
    """The stretch `first` to `last` − 1 of every stream, and what it holds."""

    first: int
    last: int
    runs: tuple[tuple[Run, ...], ...]
    """By shard; offsets count from the beginning of the unit."""
    weights: tuple[int, ...]
    """All weights in it, in order."""


@dataclass(frozen=True)
class ShardLayout:
    """The streams of `shards` shards over weights of `counts` elements, in the order of the
    backward pass.
    """

    counts: tuple[int, ...]
    shards: int
    deals: tuple[Deal, ...]
    """How each weight is dealt out."""

    @cached_property
    def streams(self) -> tuple[tuple[Run, ...], ...]:
        """The runs of each shard, in order."""
        found: list[list[Run]] = [[] for _ in range(self.shards)]
        ends = [0] * self.shards
        for group in self._groups():
            # One weight alone goes to the first of the shards, which are all empty.
            owners = self._owners(group)
            for weight in group:
                self._deal(weight, owners.get(weight), found, ends)
        return tuple(map(tuple, found))

    @cached_property
    def length(self) -> int:
        """The elements of the longest stream, in whole lines."""
        return _length(self.streams)

    def units(self, elements: int) -> list[Unit]:
        """Cut the streams into units of at most `elements` elements over all shards."""
        return self._cut(self.streams, elements)

    def units_of(self, weights: Collection[int], elements: int = 0) -> list[Unit]:
        """Pack the runs of `weights` alone into streams, and cut these as `units` does; 0: into one
        unit.
        """
        packed: list[list[Run]] = [[] for _ in range(self.shards)]
        for stream, found in zip(self.streams, packed, strict=True):
            end = 0
            for run in stream:
                if run.weight in weights:
                    found.append(replace(run, offset=end))
                    end += _lines(run.count)
        return self._cut(packed, elements or self.shards * _length(packed))

    def _cut(self, streams: Sequence[Sequence[Run]], elements: int) -> list[Unit]:
        size = max(1, elements // (self.shards * LINE_ELEMENTS)) * LINE_ELEMENTS
        length, units = _length(streams), []
        for first in range(0, length, size):
            last = min(first + size, length)
            runs = tuple(tuple(_clipped(stream, first, last)) for stream in streams)
            weights = sorted({run.weight for stream in runs for run in stream})
            units.append(Unit(first, last, runs, tuple(weights)))
        return units

    def _deal(
        self, weight: int, owner: int | None, found: list[list[Run]], ends: list[int]
    ) -> None:
        """Append the runs of a weight to the streams."""
        count = self.counts[weight]
        if owner is not None:
            found[owner].append(Run(weight, 0, count, ends[owner]))
            ends[owner] += _lines(count)
            return
        size = _lines(-(-count // self.shards))
        for shard in range(self.shards):
            first = min(shard * size, count)
            if held := min(size, count - first):
                found[shard].append(Run(weight, first, held, ends[shard]))
            # Streams stay in step: a short last run leaves a gap.
            ends[shard] += size

    def _groups(self) -> list[list[int]]:
        """Group the weights: an evenly cut one alone, whole ones until their shares are even."""
        groups: list[list[int]] = []
        open_group: list[int] = []
        for weight, deal in enumerate(self.deals):
            if deal != "whole":
                groups.append([weight])
                continue
            open_group.append(weight)
            shares = self._shares(open_group)
            if max(shares) * self.shards <= UNEVEN * sum(shares):
                groups.append(open_group)
                open_group = []
        return [*groups, open_group] if open_group else groups

    def _owners(self, group: Sequence[int]) -> dict[int, int]:
        """Return the shard of each whole weight: the largest first, to the least filled shard."""
        filled, owners = [0] * self.shards, {}
        for weight in sorted(group, key=lambda each: -self.counts[each]):
            if self.deals[weight] != "even":
                owners[weight] = filled.index(min(filled))
                filled[owners[weight]] += _lines(self.counts[weight])
        return owners

    def _shares(self, group: Sequence[int]) -> list[int]:
        shares = [0] * self.shards
        for weight, owner in self._owners(group).items():
            shares[owner] += _lines(self.counts[weight])
        return shares


def _clipped(stream: Sequence[Run], first: int, last: int) -> list[Run]:
    """Return what of a stream is in the stretch, with offsets that count from `first`."""
    found = []
    for run in stream:
        begin, end = max(run.offset, first), min(run.offset + run.count, last)
        if begin < end:
            skipped = begin - run.offset
            found.append(Run(run.weight, run.first + skipped, end - begin, begin - first))
    return found


def _length(streams: Sequence[Sequence[Run]]) -> int:
    """Return the elements of the longest of `streams`, in whole lines."""
    ends = (run.offset + run.count for stream in streams for run in stream)
    return _lines(max(ends, default=0))


def _lines(count: int) -> int:
    return -(-count // LINE_ELEMENTS) * LINE_ELEMENTS
