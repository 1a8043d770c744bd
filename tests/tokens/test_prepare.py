"""Preparation: the same bytes on any number of ranks, the text that went in, and the errors."""

import dataclasses
import io
import json
import resource
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.errors import DataError, UsageError
from mpillm.system.console import Console
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.reader import open_split
from mpillm.tokens.shuffle import range_of
from mpillm.tokens.split import cut_tail, split_of
from mpillm.tokens.tokenizer import train_bpe

QUIET = Console(False)


def heard(comm):
    """Make a console that rank 0 writes to, and the stream that it writes."""
    stream = io.StringIO()
    return Console(comm.rank == 0, stream), stream


@pytest.fixture
def corpus(folder, comm):
    """Write a folder, a JSONL and a text file, with duplicates, empty lines, long documents."""
    if comm.rank == 0:
        generator = np.random.default_rng(0)
        words = ["alpha", "beta", "gamma\n", "delta.", "é", "😀", "  ", "x = 1\n"]
        texts = [" ".join(generator.choice(words, generator.integers(1, 300))) for _ in range(120)]
        (folder / "texts").mkdir()
        for number, text in enumerate(texts[:50]):
            (folder / "texts" / f"{number}.txt").write_text(text)
        lines = [json.dumps({"text": text}) for text in [*texts[50:], texts[50], "", texts[0]]]
        (folder / "a.jsonl").write_text("\n".join(lines))
        (folder / "big.txt").write_text("one big file\n" * 3000)
    comm.Barrier()
    return tuple(str(folder / name) for name in ("texts", "a.jsonl", "big.txt"))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def decoded(folder, split):
    """Decode the texts of a split, shard by shard."""
    tokenizer = Manifest.load(folder).load_tokenizer()
    texts = []
    with open_split(folder, split) as reader:
        for shard in range(len(reader.split.shards)):
            start = int(reader.firsts[shard])
            for first, last in zip(
                [0, *reader.doc_ends(shard)[:-1]], reader.doc_ends(shard), strict=True
            ):
                reader.read(start + int(first), ids := np.empty(last - first, reader.dtype))
                assert ids[-1] == tokenizer.eot_id
                assert tokenizer.eot_id not in ids[:-1]
                texts.append(tokenizer.decode(ids))
    return texts


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
@pytest.mark.parametrize("validation", [0.2, 0.0])
def test_any_number_of_ranks_gives_the_same_bytes(
    corpus, folder, comm, tokenizer, validation, monkeypatch
):
    monkeypatch.setattr("mpillm.tokens.sources.JSONL_PIECE_BYTES", 5000)
    small = {"vocab_size": 300, "shard_bytes": 8192, "tokenizer_bytes": 30_000}
    options = PrepareOptions(corpus, folder / "all", tokenizer, validation=validation, **small)
    manifest = prepare(options, comm, QUIET)
    if comm.rank == 0:
        alone = prepare(
            dataclasses.replace(options, out=folder / "alone", workers=5), MPI.COMM_SELF, QUIET
        )
        assert contents(folder / "all") == contents(folder / "alone")
        assert alone.manifest_hash == manifest.manifest_hash
        assert len(manifest.splits["train"].shards) >= 3
    hashes = comm.allgather((manifest.manifest_hash, Manifest.load(folder / "all").manifest_hash))
    assert len({one for pair in hashes for one in pair}) == 1
    comm.Barrier()


def test_the_texts_come_back_shuffled_with_their_duplicates(corpus, folder, comm):
    manifest = prepare(
        PrepareOptions(corpus, folder / "out", "bytes", validation=0.2, shard_bytes=16384),
        comm,
        QUIET,
    )
    given = [path.read_text() for path in (folder / "texts").iterdir()] + [
        (folder / "big.txt").read_text()
    ]
    given += [json.loads(line)["text"] for line in (folder / "a.jsonl").read_text().splitlines()]
    given = [text for text in given if text.strip()]
    train, validation = decoded(folder / "out", "train"), decoded(folder / "out", "validation")
    assert sorted(train + validation) == sorted(given)
    assert 5 < len(validation) < 60
    assert not set(train) & set(validation)
    for name, texts in (("train", train), ("validation", validation)):
        split = manifest.splits[name]
        assert (split.n_docs, split.n_bytes) == (
            len(texts),
            sum(len(text.encode()) for text in texts),
        )
        assert split.n_tokens == split.n_bytes + split.n_docs


def test_another_seed_is_another_order(corpus, folder, comm):
    for seed in (0, 1):
        prepare(
            PrepareOptions(corpus[:1], folder / f"{seed}", "bytes", validation=0.0, seed=seed),
            comm,
            QUIET,
        )
    zero, one = decoded(folder / "0", "train"), decoded(folder / "1", "train")
    assert sorted(zero) == sorted(one)
    assert zero != one


def test_one_document_is_cut_in_two(corpus, folder, comm):
    console, said = heard(comm)
    manifest = prepare(
        PrepareOptions(corpus[2:], folder / "out", "bytes", validation=0.1), comm, console
    )
    [train], [validation] = decoded(folder / "out", "train"), decoded(folder / "out", "validation")
    assert train + validation == (folder / "big.txt").read_text()
    assert len(validation) == pytest.approx(3900, abs=13)
    assert validation.startswith("one big")
    assert manifest.splits["validation"].n_docs == 1
    assert comm.rank or "each is cut" in said.getvalue()


@pytest.mark.parametrize(
    ("text", "fraction", "parts"),
    [
        ("a\nb\nc\nd\n", 0.25, ("a\nb\nc\n", "d\n")),
        ("aaaa\nbbbbbbbb", 0.5, ("aaaa\n", "bbbbbbbb")),
        ("abcdefgh", 0.25, ("abcdef", "gh")),
        ("ab", 0.01, ("a", "b")),
        ("a", 0.5, ("", "a")),
    ],
)
def test_where_a_document_is_cut(text, fraction, parts):
    assert cut_tail(text, fraction) == parts


def test_the_split_is_a_fraction_of_the_keys_whatever_their_range():
    keys = np.random.default_rng(0).integers(0, 2**64, 40_000, np.uint64)
    split = split_of(keys, 0.05)
    assert split.mean() == pytest.approx(0.05, abs=0.005)
    assert split[keys < 2**61].mean() == pytest.approx(0.05, abs=0.015)
    assert not split_of(keys, 0.0).any()
    assert set(range_of(keys, 7).tolist()) == set(range(7))


def test_preparing_twice(corpus, folder, comm):
    options = PrepareOptions(corpus[:1], folder / "out", "bytes")
    first = prepare(options, comm, QUIET)
    console, said = heard(comm)
    assert (
        prepare(dataclasses.replace(options, workers=9), comm, console).manifest_hash
        == first.manifest_hash
    )
    assert comm.rank or "already prepared" in said.getvalue()
    with pytest.raises(
        UsageError,
        match=r"prepared otherwise \(seed 0 there, 4 now, content .*\); give --overwrite",
    ):
        prepare(dataclasses.replace(options, seed=4), comm, QUIET)
    comm.Barrier()
    if comm.rank == 0:
        (folder / "texts" / "0.txt").write_text("another text")
    comm.Barrier()
    with pytest.raises(UsageError, match=r"prepared otherwise \(n_bytes .*, content"):
        prepare(options, comm, QUIET)
    again = prepare(dataclasses.replace(options, overwrite=True), comm, QUIET)
    assert again.manifest_hash != first.manifest_hash
    assert not list(folder.glob(".out*"))


def test_a_folder_that_is_not_ours_is_never_replaced(corpus, folder, comm):
    with pytest.raises(UsageError, match="is not a prepared dataset"):
        prepare(PrepareOptions(corpus[:1], folder / "texts", overwrite=True), comm, QUIET)
    assert (folder / "texts" / "0.txt").exists()


def test_the_output_inside_a_source_is_not_a_source(corpus, folder, comm):
    options = PrepareOptions(corpus[:1], folder / "texts" / "out", "bytes")
    first = prepare(options, comm, QUIET)
    assert prepare(options, comm, QUIET).manifest_hash == first.manifest_hash


def test_an_error_leaves_no_folder(folder, comm):
    if comm.rank == 0:
        (folder / "a.txt").write_text("text")
    comm.Barrier()
    foreign = folder / "foreign.json"
    if comm.rank == 0:
        foreign.write_text(train_bpe(["x"], 257).to_json().replace("<|endoftext|>", "[FIN]"))
    comm.Barrier()
    with pytest.raises(DataError, match="known end-of-text"):
        prepare(PrepareOptions((str(folder / "a.txt"),), folder / "out", str(foreign)), comm, QUIET)
    comm.Barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "foreign.json"]


def test_a_full_disk_names_the_folder_and_the_size(folder, comm):
    """Every rank raises the same, whichever of them is at its limit; nothing is left."""
    if comm.rank == 0:
        (folder / "texts").mkdir()
        for number in range(20):
            (folder / "texts" / f"{number}.txt").write_text("a line of text\n" * 2000)
    comm.Barrier()
    options = PrepareOptions((str(folder / "texts"),), folder / "out", "bytes")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for ranks in ([0], [comm.size - 1], range(comm.size)):
        if comm.rank in ranks:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        try:
            with pytest.raises(DataError) as caught:
                prepare(options, comm, QUIET)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert str(caught.value).startswith(f"{folder}: File too large; raise the limit of file")
        assert "(to prepare 585.9 KiB of text takes up to 2.3 MiB there)" in str(caught.value)
        assert len(set(comm.allgather(str(caught.value)))) == 1
        comm.Barrier()
        assert sorted(path.name for path in folder.iterdir()) == ["texts"]
        comm.Barrier()


def test_an_interruption_leaves_no_folder(corpus, folder, comm, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mpillm.tokens.prepare.write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        # Each rank alone: an interrupted rank leaves the others waiting, until the job ends them.
        prepare(
            PrepareOptions(corpus[:1], folder / f"out{comm.rank}", "bytes"), MPI.COMM_SELF, QUIET
        )
    assert not list(folder.glob(f"*out{comm.rank}*"))


def test_a_foreign_tokenizer_with_its_end_of_text_named(corpus, folder, comm):
    if comm.rank == 0:
        (folder / "foreign.json").write_text(
            train_bpe(["x"], 257).to_json().replace("<|endoftext|>", "[FIN]")
        )
    comm.Barrier()
    options = PrepareOptions(
        corpus[:1], folder / "out", str(folder / "foreign.json"), end_of_text="[FIN]"
    )
    manifest = prepare(options, comm, QUIET)
    assert manifest.tokenizer["name"] == "foreign"
    assert manifest.load_tokenizer().end_of_text == "[FIN]"
    assert len(decoded(folder / "out", "train")) == manifest.splits["train"].n_docs


def test_bytes_that_are_not_utf8_are_reported(folder, comm):
    if comm.rank == 0:
        (folder / "texts").mkdir()
        for name in ("a", "b", "c"):
            (folder / "texts" / name).write_bytes(
                b"caf\xe9\n" * (1 if name == "a" else 4) if name != "b" else b"fine"
            )
    comm.Barrier()
    console, said = heard(comm)
    prepare(PrepareOptions((str(folder / "texts"),), folder / "out", "bytes"), comm, console)
    if comm.rank == 0:
        assert "5 places aren't UTF-8" in said.getvalue()
        assert f"first in {folder / 'texts' / 'a'}" in said.getvalue()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sources": ("nowhere",)}, "there is no source nowhere"),
        ({"vocab_size": 200}, "--vocab-size takes 257 to 16,777,216, and not 200"),
        ({"validation": 1.0}, "--validation 1 leaves no document to train on"),
        ({"validation": -0.1}, "--validation takes 0 to 1, and not -0.1"),
        ({"shard_bytes": 10}, "--shard-bytes takes 4,096 to 2,147,483,648, and not 10"),
        ({"workers": -1}, "--workers takes 0 to 1,024, and not -1"),
        ({"seed": 1 << 63}, "--seed takes 0 or more, and not 9223372036854775808"),
        ({"seed": -1}, "--seed takes 0 or more, and not -1"),
        ({"vocab_size": 10**12}, "--vocab-size takes 257 to 16,777,216, and not 1000000000000"),
        ({"end_of_text": "</s>"}, "--end-of-text names a token of a FILE tokenizer; bpe has its"),
        (
            {"end_of_text": "</s>", "tokenizer": "bytes"},
            "--end-of-text names a token of a FILE tokenizer; bytes has its own",
        ),
        ({"tokenizer_bytes": 1 << 60}, "a BPE is trained on 1 to"),
        ({"out": Path("a\0b")}, "--out holds a NUL byte"),
        ({"tokenizer": "/nowhere.json"}, "cannot read the tokenizer"),
        ({"glob": "*.none"}, "is empty"),
        ({"sources": ("blank",)}, "is empty: none of its files holds text"),
    ],
)
def test_wrong_inputs_are_reported_on_every_rank(corpus, folder, comm, change, says, monkeypatch):
    monkeypatch.chdir(folder)
    if comm.rank == 0:
        (folder / "blank").write_text("\n \n")
    comm.Barrier()
    options = dataclasses.replace(PrepareOptions(corpus[:1], folder / "out"), **change)
    with pytest.raises((UsageError, DataError)) as caught:
        prepare(options, comm, QUIET)
    assert says in str(caught.value)
    assert len(set(comm.allgather(str(caught.value)))) == 1
    assert not (folder / "out").exists()
