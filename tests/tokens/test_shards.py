"""Shards, manifest and reader: data written is read, by HDF5 and without; damage is reported."""

import json

import h5py
import numpy as np
import pytest
from mpi4py import MPI

from mpillm.errors import DataError, MismatchError
from mpillm.system import hdf5
from mpillm.tokens.manifest import Manifest, Split, check_tokenizer, tokenizer_facts
from mpillm.tokens.reader import open_split
from mpillm.tokens.shards import BLOCK_BYTES, Documents, write_shard
from mpillm.tokens.tokenizer import byte_tokenizer, train_bpe

pytestmark = pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="no messages: serial pass only")

LENGTHS = [[5, 1, 700_000, 3], [2], [40, 60]]


def documents(lengths, dtype="<u2", seed=0):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 257, sum(lengths)).astype(dtype)
    n = len(lengths)
    keys = generator.integers(0, 2**63, n).astype(np.uint64)
    return Documents(tokens, np.cumsum(lengths), np.arange(n).astype("<u2"), keys)


@pytest.fixture
def dataset(tmp_path):
    """Three shards, and all their tokens."""
    attributes = {"vocab_size": 257, "split": "train"}
    contents = [documents(lengths, seed=i) for i, lengths in enumerate(LENGTHS)]
    shards = [
        write_shard(tmp_path / f"train-{i:05d}.h5", c, attributes) for i, c in enumerate(contents)
    ]
    split = Split(sum(s.n_tokens for s in shards), sum(s.n_docs for s in shards), 1, tuple(shards))
    splits = {"train": split, "validation": Split(0, 0, 0, ())}
    Manifest(tmp_path, tokenizer_facts(byte_tokenizer()), {}, splits).save()
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_json())
    return tmp_path, np.concatenate([c.tokens for c in contents])


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_hdf5_reads_what_was_written(tmp_path, dtype):
    written = documents(LENGTHS[0], dtype)
    info = write_shard(tmp_path / "a.h5", written, {"seed": 3, "split": "train"})
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["tokens"].dtype == np.dtype(dtype)
        assert np.array_equal(file["tokens"][:], written.tokens)
        assert np.array_equal(file["doc_ends"][:], written.ends)
        assert np.array_equal(file["doc_key"][:], written.key)
        assert file["doc_source"].dtype == np.uint16
        assert file["tokens"].id.get_offset() == info.tokens_offset
        assert file["doc_ends"].id.get_offset() == info.doc_ends_offset
        assert len(file["block_xxh3"]) == -(-written.tokens.nbytes // BLOCK_BYTES)
        assert dict(file.attrs) == {
            "format": "mpillm.tokens",
            "version": 1,
            "n_tokens": 700_009,
            "n_docs": 4,
            "block_bytes": BLOCK_BYTES,
            "complete": True,
            "seed": 3,
            "split": "train",
        }


def test_equal_contents_give_equal_bytes(tmp_path):
    for name in ("a.h5", "b.h5"):
        write_shard(tmp_path / name, documents([9, 9]), {"seed": 3})
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_reading_across_shards(dataset):
    folder, tokens = dataset
    with open_split(folder) as reader:
        assert (reader.n_tokens, reader.n_docs) == (len(tokens), 7)
        for start, count in [
            (0, len(tokens)),
            (700_000, 60),
            (700_008, 3),
            (700_009, 2),
            (5, 1),
            (len(tokens), 0),
        ]:
            out = np.empty(count, reader.dtype)
            reader.read(start, out)
            assert np.array_equal(out, tokens[start : start + count])
        assert [reader.doc_ends(i).tolist() for i in range(3)] == [
            np.cumsum(x).tolist() for x in LENGTHS
        ]
        reader.close()
        reader.read(1, out := np.empty(3, reader.dtype))
        assert np.array_equal(out, tokens[1:4])
        with pytest.raises(
            DataError, match=r"has 700,111 tokens of uint16, asked for 9 of uint16 from 700,110"
        ):
            reader.read(700_110, np.empty(9, reader.dtype))


def test_the_hash_of_a_manifest_is_its_files(dataset):
    folder, _ = dataset
    manifest = Manifest.load(folder)
    text = (folder / "manifest.json").read_text()
    assert json.loads(text)["digest"] == manifest.manifest_hash
    own = f',\n "digest": "{manifest.manifest_hash}"'
    assert manifest.manifest_hash == hdf5.digest(text.replace(own, "").encode())
    assert (manifest.vocab_size, manifest.eot_id) == (257, 256)
    assert manifest.load_tokenizer().name == "bytes"


def test_another_tokenizer(dataset):
    folder, _ = dataset
    other = train_bpe(["abc abc abc"], 258)
    with pytest.raises(MismatchError, match=r"made with the tokenizer bytes .*, not with bpe"):
        check_tokenizer(Manifest.load(folder), other)
    (folder / "tokenizer.json").write_text(other.to_json())
    with pytest.raises(MismatchError):
        Manifest.load(folder).load_tokenizer()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"lacks its tokenizer\.json"):
        Manifest.load(folder).load_tokenizer()


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(
        DataError, match=r"is not a prepared dataset: it has no manifest\.json; make one with"
    ):
        open_split(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot read"),
        ("[]", "found format None version None"),
        ('{"format": "x", "version": 1}', "found format x version 1"),
        ('{"format": "mpillm.tokens", "version": 2}', "found format mpillm.tokens version 2"),
        ('{"format": "mpillm.tokens", "version": 1, "splits": {"train": 1}}', "lacks a part"),
    ],
)
def test_a_manifest_that_is_not_ours(tmp_path, text, says):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json") as caught:
        open_split(tmp_path)
    assert says in str(caught.value)


def test_missing_and_changed_shards(dataset):
    folder, _ = dataset
    path = folder / "train-00001.h5"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(
        DataError, match=rf"train-00001\.h5 is cut short: expected {len(whole):,} bytes, found"
    ):
        open_split(folder)
    path.write_bytes(whole + b"x")
    with pytest.raises(DataError, match="not the file that was written"):
        open_split(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"lists .*train-00001\.h5, but: No such file"):
        open_split(folder)


def test_offsets_beyond_the_file(dataset):
    folder, _ = dataset
    value = json.loads((folder / "manifest.json").read_text())
    value["splits"]["train"]["shards"][0]["tokens_offset"] += 1 << 30
    (folder / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match="beyond its end"):
        open_split(folder)


def test_a_file_that_shrinks_while_it_is_read(dataset):
    folder, tokens = dataset
    reader = open_split(folder)
    with (folder / "train-00000.h5").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(DataError, match="has shrunk while in use"):
        reader.read(0, np.empty(len(tokens), reader.dtype))


def test_a_split_that_is_not_there(dataset):
    folder, _ = dataset
    with pytest.raises(
        DataError, match=r"no validation split \(it has train\); prepare it with a --validation"
    ):
        open_split(folder, "validation")
    with pytest.raises(DataError, match="no test split"):
        open_split(folder, "test")


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_shard(tmp_path / "a.h5", documents([3]), {"bad": object()})
    assert not list(tmp_path.iterdir())
