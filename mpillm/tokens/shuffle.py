"""Shuffle by hash: documents travel by Alltoallv to the rank that writes their shard.

In wave w, rank r writes shard w · size + r. So a rank holds the documents of one shard at a time,
in at most three copies (to send, received, sorted), however large the dataset is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mpillm.comm.failure import on_all
from mpillm.errors import DataError
from mpillm.system import hdf5
from mpillm.system.console import Progress
from mpillm.tokens.encode import EncodedDocuments
from mpillm.tokens.manifest import SPLITS
from mpillm.tokens.shards import Documents, ShardFile

if TYPE_CHECKING:
    from mpi4py import MPI

Array = np.ndarray[Any, np.dtype[Any]]
Written = TypeVar("Written", bound=ShardFile)
WriteShard = Callable[[Path, Documents, dict[str, Any]], Written]

# MPI-3 counts elements, and the displacements of the ranks' parts, by int32.
LARGEST_PART = 1 << 30

COLUMNS = ("key", "ordinal", "source", "n_tokens")


@dataclass(frozen=True)
class ShufflePlan:
    """All shards, training first: `shards[i]` is (split, number in the split, shards of the split).

    `shard_of` (n,) gives the shard of each of this rank's encoded documents.
    """

    shards: list[tuple[str, int, int]]
    shard_of: Array


def plan_shuffle(encoded: EncodedDocuments, shard_bytes: int, comm: "MPI.Intracomm") -> ShufflePlan:
    """Cut the hash space of each split into equal ranges of about `shard_bytes`, a shard each.

    A range without a document has no shard. Every rank calls it.
    """
    shards: list[tuple[str, int, int]] = []
    shard_of = np.zeros(len(encoded.index), np.int64)
    for split, name in enumerate(SPLITS):
        mine = encoded.index["split"] == split
        n_tokens = comm.allreduce(int(encoded.index["n_tokens"][mine].sum()))
        ranges = -(-n_tokens * encoded.dtype.itemsize // shard_bytes)
        where = range_of(encoded.index["key"][mine], ranges)
        counts = np.zeros(ranges, np.int64)
        comm.Allreduce(np.bincount(where, minlength=ranges).astype(np.int64), counts)
        numbers = np.cumsum(counts > 0) - 1
        shard_of[mine] = len(shards) + numbers[where]
        total = int((counts > 0).sum())
        shards += [(name, number, total) for number in range(total)]
    return ShufflePlan(shards, shard_of)


def write_shards(
    encoded: EncodedDocuments,
    plan: ShufflePlan,
    folder: Path,
    attributes: dict[str, Any],
    comm: "MPI.Intracomm",
    progress: Progress,
    describe: Callable[[OSError], str],
    write: WriteShard[Written],
) -> list[tuple[str, Written]]:
    """Exchange and write all shards. Every rank calls it.

    Returns (split, shard) in order on rank 0, an empty list elsewhere. `attributes` are those that
    all shards share. `progress` counts shards. `describe` words an OSError, which becomes a
    DataError on every rank. `write` makes a file of sorted documents.
    """
    written: list[tuple[int, Written]] = []
    by_shard = np.argsort(plan.shard_of, kind="stable")
    bounds = np.searchsorted(plan.shard_of[by_shard], np.arange(len(plan.shards) + comm.size + 1))
    starts = encoded.starts
    for wave in range(0, len(plan.shards), comm.size):
        # The documents of this wave, in the order of their owners.
        rows = by_shard[bounds[wave] : bounds[wave + comm.size]]
        counts = np.diff(bounds[wave : wave + comm.size + 1])
        tokens = on_all(comm, partial(_read, encoded, rows, starts[rows]), describe)
        arrived = _exchange(encoded.index[rows], tokens, counts, comm)
        number = wave + comm.rank
        mine = plan.shards[number : number + 1]
        write_own = partial(_write_own, mine, arrived, folder, attributes, write)
        written += [(number, shard) for shard in on_all(comm, write_own, describe)]
        progress.advance(min(comm.size, len(plan.shards) - wave))
    everything = sorted(
        (item for own in comm.gather(written) or [] for item in own), key=lambda item: item[0]
    )
    return [(plan.shards[number][0], shard) for number, shard in everything]


def range_of(keys: Array, ranges: int) -> Array:
    """Find which of `ranges` equal ranges of the hash space each key falls in."""
    return (((keys >> np.uint64(32)) * np.uint64(ranges)) >> np.uint64(32)).astype(np.int64)


def _write_own(
    mine: list[tuple[str, int, int]],
    arrived: tuple[Array, Array],
    folder: Path,
    attributes: dict[str, Any],
    write: WriteShard[Written],
) -> list[Written]:
    """Write this rank's shard of the wave, if it has one. Raises OSError."""
    written = []
    for split, index, total in mine:
        own = {"split": split, "shard_index": index, "n_shards": total}
        path = folder / f"{split}-{index:05d}.h5"
        written.append(write(path, _sorted(*arrived), {**attributes, **own}))
    return written


def _read(encoded: EncodedDocuments, rows: Array, starts: Array) -> Array:
    """Read the tokens of the documents `rows` from this rank's file, in their order."""
    lengths = encoded.index["n_tokens"][rows]
    tokens = np.empty(int(lengths.sum()), encoded.dtype)
    with encoded.path.open("rb", buffering=0) as file:
        descriptor, itemsize = file.fileno(), encoded.dtype.itemsize
        for start, stop, length in zip(
            starts.tolist(), np.cumsum(lengths).tolist(), lengths.tolist(), strict=True
        ):
            try:
                hdf5.read_at(descriptor, tokens[stop - length : stop], start * itemsize)
            except EOFError as failure:
                raise DataError(
                    f"{encoded.path} has shrunk while in use: {failure}; prepare again"
                ) from failure
    return tokens


def _exchange(
    index: Array, tokens: Array, counts: Array, comm: "MPI.Intracomm"
) -> tuple[Array, Array]:
    """Send the next `counts[r]` of the documents of `index`, with their tokens, to rank r.

    Returns the received documents: a table u8 (n, 4) of COLUMNS, and their tokens in its order.
    """
    table = np.stack([index[name].astype(np.uint64) for name in COLUMNS], axis=1)
    stops = np.concatenate(([0], np.cumsum(index["n_tokens"])))
    token_counts = np.diff(stops[np.concatenate(([0], np.cumsum(counts)))])
    return (
        _alltoallv(table.reshape(-1), counts * len(COLUMNS), comm).reshape(-1, len(COLUMNS)),
        _alltoallv(tokens, token_counts, comm),
    )


def _alltoallv(
    sendbuf: Array, sendcounts: Array, comm: "MPI.Intracomm", limit: int = LARGEST_PART
) -> Array:
    """Exchange all to all: `sendbuf` holds the parts for each rank in order; so does the result.

    A call moves up to `limit` elements from a rank to all: what is longer takes several calls.
    """
    sendcounts = np.ascontiguousarray(sendcounts, np.int64)
    recvcounts = np.empty_like(sendcounts)
    comm.Alltoall(sendcounts, recvcounts)
    recvbuf = np.empty(int(recvcounts.sum()), sendbuf.dtype)
    # Each pair of ranks moves so many elements a call; counts and displacements are 32 bits wide.
    step = max(limit // comm.size, 1)
    largest = max(comm.allgather(int(sendcounts.max())))
    if largest <= step:
        comm.Alltoallv([sendbuf, sendcounts.tolist()], [recvbuf, recvcounts.tolist()])
        return recvbuf
    sendfirsts, recvfirsts = (np.cumsum(c) - c for c in (sendcounts, recvcounts))
    for done in range(0, largest, step):
        sent, received = (np.clip(c - done, 0, step) for c in (sendcounts, recvcounts))
        piece = np.concatenate(
            [sendbuf[a : a + n] for a, n in zip(sendfirsts + done, sent, strict=True)]
        )
        arrived = np.empty(int(received.sum()), sendbuf.dtype)
        comm.Alltoallv([piece, sent.tolist()], [arrived, received.tolist()])
        place = 0
        for first, count in zip((recvfirsts + done).tolist(), received.tolist(), strict=True):
            recvbuf[first : first + count] = arrived[place : place + count]
            place += count
    return recvbuf


def _sorted(table: Array, tokens: Array) -> Documents:
    """Sort the documents by (key, ordinal): a shuffle by hash, the same on any number of ranks."""
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
