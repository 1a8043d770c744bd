"""Verification finds any byte that isn't as it was written, and says where."""

import dataclasses

import pytest

from mpillm.errors import DataError, MismatchError
from mpillm.system.console import Console
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.tokenizer import train_bpe
from mpillm.tokens.verify import verify

QUIET = Console(False)


@pytest.fixture
def dataset(folder, comm):
    if comm.rank == 0:
        (folder / "texts").mkdir()
        for number in range(40):
            (folder / "texts" / f"{number}.txt").write_text(f"document {number}\n" * 8000)
    comm.Barrier()
    options = PrepareOptions(
        (str(folder / "texts"),), folder / "out", "bytes", validation=0.1, shard_bytes=3 << 20
    )
    prepare(options, comm, QUIET)
    return folder / "out"


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def fault(dataset, comm, kind=DataError):
    """Return the message that verify raises, the same on every rank."""
    with pytest.raises(kind) as caught:
        verify(dataset, comm, QUIET)
    assert len(set(comm.allgather(str(caught.value)))) == 1
    return str(caught.value)


def test_a_whole_dataset(dataset, comm):
    assert verify(dataset, comm, QUIET) == Manifest.load(dataset)


@pytest.mark.parametrize("block", [0, 1, -1])
def test_a_flipped_bit_is_found_in_its_block(dataset, comm, block):
    shard = Manifest.load(dataset).splits["train"].shards[1]
    blocks = -(-shard.tokens_nbytes // (1 << 20))
    block %= blocks
    start = shard.tokens_offset + (block << 20)
    stop = min(start + (1 << 20), shard.tokens_offset + shard.tokens_nbytes)
    comm.Barrier()
    if comm.rank == 0:
        flip(dataset / shard.file, stop - 1)
    comm.Barrier()
    said = fault(dataset, comm)
    assert (
        f"{shard.file} is damaged in block {block} of /tokens (bytes {start:,} to {stop:,})" in said
    )


@pytest.mark.parametrize("place", ["attributes", "doc_ends", "last"])
def test_a_flipped_bit_outside_the_tokens(dataset, comm, place):
    shard = Manifest.load(dataset).splits["validation"].shards[0]
    path = dataset / shard.file
    offset = {
        "attributes": path.read_bytes().index(b"tokenizer_sha256"),
        "doc_ends": shard.doc_ends_offset,
        "last": shard.nbytes - 1,
    }[place]
    comm.Barrier()
    if comm.rank == 0:
        flip(path, offset)
    comm.Barrier()
    assert f"{shard.file} is damaged outside /tokens" in fault(dataset, comm)


def test_the_first_of_several_faults_is_reported(dataset, comm):
    shards = Manifest.load(dataset).splits["train"].shards
    comm.Barrier()
    if comm.rank == 0:
        for shard in shards:
            flip(dataset / shard.file, shard.tokens_offset)
    comm.Barrier()
    assert shards[0].file in fault(dataset, comm)


def test_a_manifest_of_other_shards(dataset, comm):
    comm.Barrier()
    if comm.rank == 0:
        path = dataset / "manifest.json"
        path.write_text(path.read_text().replace('"eot_id": 256', '"eot_id": 0'))
    comm.Barrier()
    assert "manifest.json is damaged: its digest is" in fault(dataset, comm)


def test_a_whole_manifest_of_other_shards(dataset, comm):
    manifest = Manifest.load(dataset)
    comm.Barrier()
    if comm.rank == 0:
        dataclasses.replace(manifest, tokenizer={**manifest.tokenizer, "eot_id": 0}).save()
    comm.Barrier()
    assert "tokenizer.eot_id is 0, that of" in fault(dataset, comm)
    if comm.rank == 0:
        train, validation = (manifest.splits[name] for name in ("train", "validation"))
        dataclasses.replace(manifest, splits={"train": validation, "validation": train}).save()
    comm.Barrier()
    assert "attribute split should be train, found validation" in fault(dataset, comm)


def test_a_missing_a_short_and_a_foreign_file(dataset, comm):
    path = dataset / "train-00000.h5"
    comm.Barrier()
    if comm.rank == 0:
        path.write_bytes(path.read_bytes()[:-1])
    comm.Barrier()
    assert "is cut short" in fault(dataset, comm)
    if comm.rank == 0:
        path.unlink()
    comm.Barrier()
    assert "No such file" in fault(dataset, comm)
    if comm.rank == 0:
        (dataset / "tokenizer.json").write_text(train_bpe(["x"], 257).to_json())
    comm.Barrier()
    assert "made with the tokenizer bytes" in fault(dataset, comm, MismatchError)
