"""Shards, manifest and reader: data written is read, by HDF5 and without; damage is reported."""

import errno
import json
import resource

import h5py
import numpy as np
import pytest
from mpi4py import MPI

from mpillm.errors import DataError, MismatchError
from mpillm.system import hdf5
from mpillm.tokens.manifest import Manifest, Split, check_tokenizer, tokenizer_facts
from mpillm.tokens.reader import open_split
from mpillm.tokens.shards import BLOCK_BYTES, Documents, read_structure, write_shard
from mpillm.tokens.tokenizer import byte_tokenizer, train_bpe
from mpillm.tokens.windows import ReadPlan

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


def edit(folder, change):
    """Change the parsed manifest, as a hostile or damaged one without a digest."""
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    del value["digest"]
    change(value)
    path.write_text(json.dumps(value))


SHARD = ("splits", "train", "shards", 0)


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ((*SHARD, "file"), "../secret.h5", "shards[0].file should be a plain file name"),
        ((*SHARD, "file"), "/etc/passwd", "a plain file name in the same folder"),
        ((*SHARD, "file"), "a\0b", "a plain file name"),
        ((*SHARD, "file"), "..", "a plain file name"),
        ((*SHARD, "file"), 3, "a plain file name in the same folder, found 3"),
        ((*SHARD, "file"), "train-00001.h5", "train-00001.h5 several times"),
        ((*SHARD, "dtype"), "<f8", "dtype should be <u2 or <u4, found '<f8'"),
        ((*SHARD, "dtype"), "<u4", "not beyond its end"),
        ((*SHARD, "n_tokens"), 1 << 60, "not beyond its end"),
        ((*SHARD, "n_tokens"), -1, "n_tokens should be a whole number from 0"),
        ((*SHARD, "n_tokens"), 10**400, "n_tokens should be a whole number from 0"),
        ((*SHARD, "n_tokens"), 5.0, "n_tokens should be a whole number from 0"),
        ((*SHARD, "n_tokens"), True, "n_tokens should be a whole number from 0"),
        ((*SHARD, "n_docs"), 3, "splits.train.n_docs should be 6, the sum of its shards, found 7"),
        ((*SHARD, "tokens_offset"), 1 << 62, "not beyond its end"),
        ((*SHARD, "xxh3_128"), "no hash", "xxh3_128 should be 32 hexadecimal digits"),
        ((*SHARD, "more"), 1, "should be the fields file, dtype"),
        ((*SHARD,), None, "shards[0] should be an object, found None"),
        (("splits", "train", "n_tokens"), 1 << 60, "should be 700,111, the sum of its shards"),
        (("splits", "train", "n_bytes"), "9", "n_bytes should be a whole number"),
        (("splits", "train", "shards"), {}, "splits.train.shards should be a list"),
        (("splits", "test"), {}, "splits should be the fields train, validation, found 'test'"),
        (("tokenizer", "vocab_size"), 1 << 60, "vocab_size should be a whole number from 1"),
        (("tokenizer", "eot_id"), 257, "eot_id should be a whole number from 0 to 256, found 257"),
        (("tokenizer", "sha256"), "abc", "tokenizer.sha256 should be 64 hexadecimal digits"),
        (("tokenizer", "name"), None, "tokenizer.name should be text"),
        (("prep",), [], "prep should be an object"),
        (("extra",), 1, "the file should be the fields"),
    ],
)
def test_each_field_of_a_manifest_has_its_rule(dataset, where, value, says):
    folder, _ = dataset

    def change(whole):
        *path, last = where
        for key in path:
            whole = whole[key]
        whole[last] = value

    edit(folder, change)
    with pytest.raises(DataError) as caught:
        open_split(folder)
    assert says in str(caught.value)
    assert str(folder / "manifest.json") in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_manifest_without_a_digest_still_loads(dataset):
    folder, _ = dataset
    before = Manifest.load(folder)
    edit(folder, lambda value: None)
    assert Manifest.load(folder) == before


@pytest.mark.parametrize("text", ["[" * 100_000, "\ud800", '{"a": 1' + "0" * 5000 + "}", ""])
def test_a_manifest_that_cannot_be_parsed(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match="cannot read"):
        Manifest.load(tmp_path)


def test_every_flip_in_a_manifest_is_found(dataset):
    folder, _ = dataset
    path, generator = folder / "manifest.json", np.random.default_rng(0)
    whole = path.read_bytes()
    before = Manifest.load(folder)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole))] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            found = Manifest.load(folder)
        except DataError:
            continue
        # White space between the values, which holds nothing.
        assert found == before


def flip_token(folder, shard, position, value):
    with (folder / shard.file).open("r+b") as file:
        file.seek(shard.tokens_offset + 2 * position)
        file.write(int(value).to_bytes(2, "little"))


def test_an_id_beyond_the_vocabulary(dataset):
    folder, tokens = dataset
    shard = Manifest.load(folder).splits["train"].shards[2]
    flip_token(folder, shard, 7, 257 | 1 << 14)
    says = (
        rf"train-00002\.h5 is damaged: token 700,018 of the train split \(byte "
        rf"{shard.tokens_offset + 14:,} of the file\) is 16,641, the vocabulary ends at 256; "
        r"`mpillm prepare --verify .*` finds all damage"
    )
    with open_split(folder) as reader:
        reader.read(0, np.empty(700_018, reader.dtype))
        with pytest.raises(DataError, match=says):
            reader.read(0, np.empty(len(tokens), reader.dtype))
        for starts in ([5, 700_016, 3], [700_005]):
            plan = ReadPlan(reader, np.array(starts), 40)
            with pytest.raises(DataError, match=says):
                plan.fetch(0, np.empty((len(starts), 40), reader.dtype))


@pytest.mark.parametrize("place", ["doc_ends_offset", "end"])
def test_damage_in_the_document_tables_is_found_where_they_are_read(dataset, place):
    folder, _ = dataset
    shard = Manifest.load(folder).splits["train"].shards[0]
    with (folder / shard.file).open("r+b") as file:
        file.seek(shard.doc_ends_offset if place == "doc_ends_offset" else shard.nbytes - 1)
        [byte] = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with (
        open_split(folder) as reader,
        pytest.raises(DataError, match=r"train-00000\.h5 is damaged outside /tokens"),
    ):
        ReadPlan(reader, np.array([0]), 9)


def external(file, count):
    file.create_dataset("tokens", (count,), "<u2", external=[("raw", 0, h5py.h5f.UNLIMITED)])


def virtual(file, count):
    layout = h5py.VirtualLayout((count,), "<u2")
    layout[:] = h5py.VirtualSource("other.h5", "tokens", (count,))
    file.create_virtual_dataset("tokens", layout)


# What replaces the array `tokens` (file, number of tokens).
HOSTILE = {
    "none": lambda file, count: None,
    "soft link": lambda file, count: file.update({"tokens": h5py.SoftLink("/doc_ends")}),
    "external link": lambda file, count: file.update({"tokens": h5py.ExternalLink("b.h5", "/a")}),
    "broken link": lambda file, count: file.update({"tokens": h5py.SoftLink("/nowhere")}),
    "external array": external,
    "virtual array": virtual,
    "circle": lambda file, count: file.update({"tokens": file["/"]}),
    "text": lambda file, count: file.update({"tokens": "text"}),
    "empty": lambda file, count: file.update({"tokens": h5py.Empty("<u2")}),
    "another shape": lambda file, count: file.update({"tokens": np.zeros((count, 1), "<u2")}),
    "another type": lambda file, count: file.update({"tokens": np.zeros(count, "<f4")}),
    "chunks": lambda file, count: file.create_dataset(
        "tokens", data=np.zeros(count, "<u2"), chunks=(9,)
    ),
    "a named type": lambda file, count: file.update({"tokens": np.dtype("<u2")}),
}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("none", "the array tokens should be <u2 of shape .*, found none"),
        ("soft link", "tokens is a link to another place"),
        ("external link", "tokens is a link to another place"),
        ("broken link", "tokens is a link to another place"),
        ("external array", "stored in another file"),
        ("virtual array", "stored in another file"),
        ("circle", "is there twice"),
        ("text", "the array tokens should be"),
        ("empty", "has no shape"),
        ("another shape", r"found <u2 of shape \(.*, 1\)"),
        ("another type", "found <f4"),
        ("chunks", "is chunked"),
        ("a named type", "found none"),
    ],
)
def test_a_shard_of_another_structure(dataset, kind, says):
    folder, _ = dataset
    shard = Manifest.load(folder).splits["train"].shards[2]
    path = folder / shard.file
    with h5py.File(path, "r+") as file:
        count = len(file["tokens"])
        del file["tokens"]
        HOSTILE[kind](file, count)
    with pytest.raises(DataError, match=says) as caught:
        read_structure(path, shard)
    assert str(path) in str(caught.value)


def test_the_tokenizer_is_compared_and_its_damage_named(dataset):
    folder, _ = dataset
    path = folder / "tokenizer.json"
    whole = path.read_bytes()
    for damaged in (b"", b"{", whole[:-40], b"\xff" + whole, b"[]", b"[" * 100_000):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"tokenizer\.json is damaged: .*; copy it back"):
            Manifest.load(folder).load_tokenizer()
    path.write_bytes(whole + b" ")
    with pytest.raises(MismatchError, match="made with the tokenizer bytes"):
        Manifest.load(folder).load_tokenizer()
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"lacks its tokenizer\.json"):
        Manifest.load(folder).load_tokenizer()


@pytest.mark.parametrize("limit", [0, 1000, 100_000])
def test_a_limit_of_file_sizes_is_said_in_the_systems_words(tmp_path, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large") as caught:
            write_shard(tmp_path / "a.h5", documents([200_000]), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


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
    reader.read(0, np.empty(10, reader.dtype))
    with (folder / "train-00000.h5").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(DataError, match="has shrunk while in use"):
        reader.read(0, np.empty(len(tokens), reader.dtype))


@pytest.mark.parametrize("how", ["tokens", "size", "manifest"])
def test_a_dataset_that_was_replaced_while_it_is_read(dataset, how):
    """A shard that is first opened later is of the same size, and of other tokens."""
    folder, tokens = dataset
    reader = open_split(folder)
    reader.read(0, np.empty(10, reader.dtype))
    path = folder / "train-00002.h5"
    lengths = [40, 60, 1] if how == "size" else [40, 60]
    made = write_shard(path, documents(lengths, seed=9), {"vocab_size": 257, "split": "train"})
    says = r"train-00002\.h5 is damaged outside /tokens"
    if how != "tokens":
        split = reader.split
        shards = (*split.shards[:2], made)
        totals = [sum(getattr(shard, name) for shard in shards) for name in ("n_tokens", "n_docs")]
        new = Split(*totals, 1, shards)
        splits = {"train": new, "validation": Split(0, 0, 0, ())}
        Manifest(folder, tokenizer_facts(byte_tokenizer()), {}, splits).save()
        says = r"train-00002\.h5 is not .* another dataset is there now; start again"
    with reader, pytest.raises(DataError, match=says):
        reader.read(len(tokens) - 5, np.empty(5, reader.dtype))
    if how != "tokens":
        with open_split(folder) as again:
            again.read(len(tokens) - 5, np.empty(5, again.dtype))


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
