"""From spills to shards: documents travel by Alltoallv to the rank that writes their shard.

In waves: in wave w, rank r writes shard w · size + r. So a rank holds one shard's documents at a time, thrice at
most (to send, received, sorted), however large the dataset is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.system import hdf5
from mpillm.system.console import Progress
from mpillm.tokens.encode import EncodedDocuments
from mpillm.tokens.manifest import SPLITS
from mpillm.tokens.shards import Documents, ShardInfo, write_shard
from mpillm.tokens.splitting import range_of, ranges_for

if TYPE_CHECKING:
    from mpi4py import MPI

Array = np.ndarray[Any, np.dtype[Any]]

COLUMNS = ("key", "ordinal", "source", "n_tokens")


@dataclass(frozen=True)
class ShufflePlan:
    """Shards are numbered through, training first: `shards[i]` is (split, number in the split, how many it has).

    `shard_of` (n,) gives the shard of each document of this rank's spill.
    """

    shards: list[tuple[str, int, int]]
    shard_of: Array


def plan_shuffle(spill: EncodedDocuments, shard_bytes: int, comm: "MPI.Intracomm") -> ShufflePlan:
    """Cut the hash space of each split into ranges of about `shard_bytes`; ranges without a document have no shard."""
    shards: list[tuple[str, int, int]] = []
    shard_of = np.zeros(len(spill.index), np.int64)
    for split, name in enumerate(SPLITS):
        mine = spill.index["split"] == split
        n_tokens = comm.allreduce(int(spill.index["n_tokens"][mine].sum()))
        ranges = ranges_for(n_tokens * spill.dtype.itemsize, shard_bytes)
        where = range_of(spill.index["key"][mine], ranges)
        counts = np.zeros(ranges, np.int64)
        comm.Allreduce(np.bincount(where, minlength=ranges).astype(np.int64), counts)
        numbers = np.cumsum(counts > 0) - 1
        shard_of[mine] = len(shards) + numbers[where]
        total = int((counts > 0).sum())
        shards += [(name, number, total) for number in range(total)]
    return ShufflePlan(shards, shard_of)


def write_shards(
    spill: EncodedDocuments,
    plan_shuffle: ShufflePlan,
    folder: Path,
    attributes: dict[str, Any],
    comm: "MPI.Intracomm",
    progress: Progress,
) -> list[tuple[str, ShardInfo]]:
    """Exchange and write all shards; (split, shard) in order on rank 0, elsewhere empty. Every rank calls it.

    `attributes` are those that all shards share. `progress` counts shards. Raises OSError.
    """
    written: list[tuple[int, ShardInfo]] = []
    by_shard = np.argsort(plan_shuffle.shard_of, kind="stable")
    bounds = np.searchsorted(
        plan_shuffle.shard_of[by_shard], np.arange(len(plan_shuffle.shards) + comm.size + 1)
    )
    starts = spill.starts
    for wave in range(0, len(plan_shuffle.shards), comm.size):
        # The documents of this wave, in the order of their owners.
        rows = by_shard[bounds[wave] : bounds[wave + comm.size]]
        counts = np.diff(bounds[wave : wave + comm.size + 1])
        table, tokens = _exchange(spill, rows, starts[rows], counts, comm)
        number = wave + comm.rank
        if number < len(plan_shuffle.shards):
            split, index, total = plan_shuffle.shards[number]
            own = {"split": split, "shard_index": index, "n_shards": total}
            path = folder / f"{split}-{index:05d}.h5"
            written.append(
                (number, write_shard(path, _sorted(table, tokens), {**attributes, **own}))
            )
        progress.advance(min(comm.size, len(plan_shuffle.shards) - wave))
    everything = sorted(
        (item for own in comm.gather(written) or [] for item in own), key=lambda item: item[0]
    )
    return [(plan_shuffle.shards[number][0], shard) for number, shard in everything]


def _exchange(
    spill: EncodedDocuments, rows: Array, starts: Array, counts: Array, comm: "MPI.Intracomm"
) -> tuple[Array, Array]:
    """Send `counts[r]` of the documents `rows` to rank r; get (table u8 (n, 4) of COLUMNS, tokens in its order)."""
    lengths = spill.index["n_tokens"][rows]
    table = np.stack([spill.index[name][rows].astype(np.uint64) for name in COLUMNS], axis=1)
    tokens = np.empty(int(lengths.sum()), spill.dtype)
    stops = np.cumsum(lengths)
    with hdf5.opened(spill.path) as descriptor:
        for start, stop, length in zip(
            starts.tolist(), stops.tolist(), lengths.tolist(), strict=True
        ):
            hdf5.read_at(descriptor, tokens[stop - length : stop], start * spill.dtype.itemsize)
    token_counts = np.diff(np.concatenate(([0], stops))[np.concatenate(([0], np.cumsum(counts)))])
    return (
        _alltoallv(table.reshape(-1), counts * len(COLUMNS), comm).reshape(-1, len(COLUMNS)),
        _alltoallv(tokens, token_counts, comm),
    )


def _alltoallv(sendbuf: Array, sendcounts: Array, comm: "MPI.Intracomm") -> Array:
    """What every rank sends to this one, in the order of the ranks; `sendbuf` holds their parts in that order too."""
    sendcounts = np.ascontiguousarray(sendcounts, np.int64)
    recvcounts = np.empty_like(sendcounts)
    comm.Alltoall(sendcounts, recvcounts)
    recvbuf = np.empty(int(recvcounts.sum()), sendbuf.dtype)
    comm.Alltoallv([sendbuf, sendcounts.tolist()], [recvbuf, recvcounts.tolist()])
    return recvbuf


def _sorted(table: Array, tokens: Array) -> Documents:
    """The documents by (key, ordinal): a hash's order is a shuffle, and the same whoever sent them."""
    key, ordinal, source, lengths = table.T
    order = np.lexsort((ordinal, key))
    lengths = lengths.astype(np.int64)
    starts, ends = (np.cumsum(lengths) - lengths)[order], np.cumsum(lengths[order])
    out = np.empty_like(tokens)
    for start, stop, length in zip(
        starts.tolist(), ends.tolist(), lengths[order].tolist(), strict=True
    ):
        out[stop - length : stop] = tokens[start : start + length]
    return Documents(out, ends, source[order], key[order])
