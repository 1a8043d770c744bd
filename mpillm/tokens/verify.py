"""Read a whole dataset again and compare every byte with what was written."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.comm.waiting import patient_barrier
from mpillm.errors import DataError, MpillmError
from mpillm.system import hdf5
from mpillm.system.console import Console
from mpillm.tokens.dataset_folder import FORMAT
from mpillm.tokens.manifest import Manifest, check_shard
from mpillm.tokens.pairs.pair_shards import PairShard, check_pair_shard
from mpillm.tokens.shards import (
    BLOCK_BYTES,
    VERSION,
    ShardInfo,
    read_structure,
    rest_digest,
    token_blocks,
)

if TYPE_CHECKING:
    from mpi4py import MPI

AGAIN = "copy the file again or prepare the dataset again"


def verify(folder: str | Path, comm: "MPI.Intracomm", console: Console) -> Manifest:
    """Check all shards against the manifest, each on one rank. Every rank of `comm` calls it.

    Raises the first fault on every rank alike: DataError (a missing, short or changed file, with
    the bad block) or MismatchError (another tokenizer.json).
    """
    manifest = Manifest.load(folder)
    manifest.load_tokenizer()
    manifest.load_template()
    shards = [(name, shard) for name, split in manifest.splits.items() for shard in split.shards]
    total = sum(shard.nbytes for _, shard in shards)
    fault = None
    mine = range(comm.rank, len(shards), comm.size)
    with console.progress(
        "verifying, rank 0's", sum(shards[i][1].nbytes for i in mine), "bytes"
    ) as progress:
        for number in mine:
            try:
                verify_shard(manifest, *shards[number])
            except MpillmError as failure:
                fault = (number, failure)
                break
            progress.advance(shards[number][1].nbytes)
    patient_barrier(comm)
    faults = [found for found in comm.allgather(fault) if found]
    if faults:
        raise min(faults, key=lambda found: found[0])[1]
    tokens = sum(split.n_tokens for split in manifest.splits.values())
    console.say(
        f"{manifest.folder}: {len(shards)} shards, {tokens:,} tokens, {total:,} bytes: "
        "as they were written"
    )
    return manifest


def verify_shard(manifest: Manifest, split: str, shard: ShardInfo | PairShard) -> None:
    """Check one shard. Raises DataError with the file, and the block and bytes that differ."""
    path = manifest.folder / shard.file
    check_shard(path, shard)
    if isinstance(shard, PairShard):
        check_pair_shard(path, shard, AGAIN)
        return
    # First the structure and tables: everything else is read by them.
    if rest_digest(path, (shard.tokens_offset, shard.tokens_nbytes)) != shard.rest_xxh3_128:
        raise DataError(
            f"{path} is damaged outside /tokens "
            f"(its structure, attributes or document tables); {AGAIN}"
        )
    places, attributes = read_structure(path, shard)
    _check_attributes(path, manifest, split, shard, attributes)
    table = places["block_xxh3"]
    expected = np.empty(table.shape, "<u8")
    with path.open("rb", buffering=0) as file:
        hdf5.read_at(file.fileno(), expected, table.offset)
    if hdf5.digest(expected) != shard.xxh3_128 or places["tokens"].offset != shard.tokens_offset:
        raise DataError(
            f"the table of block hashes in {path} isn't the one in the manifest; {AGAIN}"
        )
    for block, found in token_blocks(path, shard):
        if found != int(expected[block]):
            start = shard.tokens_offset + block * BLOCK_BYTES
            stop = min(start + BLOCK_BYTES, shard.tokens_offset + shard.tokens_nbytes)
            raise DataError(
                f"{path} is damaged in block {block} of /tokens (bytes {start:,} to {stop:,}): "
                f"xxh3 {int(expected[block]):016x} was written, {found:016x} is there; {AGAIN}"
            )


def _check_attributes(
    path: Path, manifest: Manifest, split: str, shard: ShardInfo, attributes: dict[str, Any]
) -> None:
    expected = {
        "format": FORMAT,
        "version": VERSION,
        "split": split,
        "n_tokens": shard.n_tokens,
        "n_docs": shard.n_docs,
        "vocab_size": manifest.vocab_size,
        "eot_id": manifest.eot_id,
        "tokenizer_sha256": manifest.tokenizer["sha256"],
        "complete": True,
    }
    for name, value in expected.items():
        found = attributes.get(name)
        if isinstance(found, np.ndarray) or found != value:
            raise DataError(f"{path}: attribute {name} should be {value}, found {found}; {AGAIN}")
