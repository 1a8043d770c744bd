"""The pieces of the gradient's norm, whole, where shards end inside of them.

The norm is bitwise the same in every layout because its pieces depend on the weights alone
(grad_norm.py). A piece that several shards hold counts where it begins: its owner takes the rest,
its tail, from the others.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mpillm.comm.buffers import as_buffer
from mpillm.parallel.data.buckets import NORM_PIECE_ELEMENTS
from mpillm.parallel.data.shard_group import ShardGroup
from mpillm.parallel.data.shard_layout import Run
from mpillm.parallel.data.sharded_part import ShardedPart


class NormTails:
    """The tails of the pieces of all `parts`. Every rank of `group` makes it."""

    def __init__(self, parts: Sequence[ShardedPart], group: ShardGroup) -> None:
        self._parts, self._group = parts, group
        # By shard: the beginnings of its runs that are tails, as (part, run); runs in order.
        self._tails = [
            [
                (number, tail)
                for number, part in enumerate(parts)
                for run in part.layout.streams[shard]
                if (tail := _tail(run)) is not None
            ]
            for shard in range(group.shards)
        ]
        self._room = max(sum(tail.count for _, tail in tails) for tails in self._tails)

    def pieces(self, left_out: Collection[int]) -> list[Tensor]:
        """Return the pieces that begin in this rank's runs, but of the weights with the ids
        `left_out`. Every rank of the group calls it.
        """
        tails = self._exchange()
        pieces = []
        for number, part in enumerate(self._parts):
            for run in part.layout.streams[self._group.shard]:
                if id(part.weights[run.weight]) in left_out:
                    continue
                own = part.gradient_of(run.weight)
                tail = _tail(run)
                own = own[tail.count if tail else 0 :]
                found = list(torch.split(own, NORM_PIECE_ELEMENTS)) if own.numel() else []
                end = run.first + run.count
                while found and end % NORM_PIECE_ELEMENTS:
                    rest = tails.get((number, run.weight, end))
                    if rest is None:
                        break
                    found[-1] = torch.cat([found[-1], rest.to(found[-1].device)])
                    end += rest.numel()
                pieces += found
        return pieces

    def _exchange(self) -> dict[tuple[int, int, int], Tensor]:
        """Gather the tails of all shards, by (part, weight, first element)."""
        if not self._room:
            return {}
        group = self._group
        own = torch.zeros(self._room)
        done = 0
        for number, tail in self._tails[group.shard]:
            gradient = self._parts[number].gradient_of(tail.weight)
            own[done : done + tail.count] = gradient[: tail.count]
            done += tail.count
        every = torch.empty(group.axis.size, self._room)
        group.axis.comm.Allgather(as_buffer(own).octets, as_buffer(every).octets)
        found = {}
        for rank, shard in enumerate(group.shard_of_rank):
            done = 0
            for number, tail in self._tails[shard]:
                values = every[rank, done : done + tail.count]
                found[number, tail.weight, tail.first] = values
                done += tail.count
        return found


def _tail(run: Run) -> Run | None:
    """Return the beginning of a run that belongs to a piece which an earlier run begins."""
    inside = run.first % NORM_PIECE_ELEMENTS
    if not inside:
        return None
    return replace(run, count=min(run.count, NORM_PIECE_ELEMENTS - inside))
