"""Preparation of texts that are long, change, bear odd names, or end by a signal."""

import dataclasses
import io
import os
import signal
import time

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.errors import DataError
from mpillm.system.console import Console
from mpillm.tokens import sources
from mpillm.tokens.encode import split_blocks
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.reader import open_split
from mpillm.tokens.split import cut_place, cut_tail
from mpillm.tokens.survey import survey

QUIET = Console(False)
SMALL = {"vocab_size": 300, "shard_bytes": 8192, "tokenizer_bytes": 20_000}


@pytest.fixture
def texts(folder, comm):
    """Write a folder of one long text among short ones."""
    if comm.rank == 0:
        chance = np.random.default_rng(4)
        words = ["alpha", "beta\n", "gamma,", "é", "😀"]
        (folder / "texts").mkdir()
        for number in range(12):
            text = " ".join(chance.choice(words, 4000 if number == 5 else 50))
            encoding = "utf-16" if number == 7 else "utf-8"
            (folder / "texts" / f"{number:02d}.txt").write_text(text, encoding=encoding)
    comm.Barrier()
    return str(folder / "texts")


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
@pytest.mark.parametrize("only", ["", "/05.txt"], ids=["all", "cut"])
def test_a_long_text_gives_the_same_bytes_in_blocks(
    texts, folder, comm, tokenizer, only, monkeypatch
):
    options = PrepareOptions((f"{texts}{only}",), folder / "whole", tokenizer, **SMALL)
    prepare(options, comm, QUIET)
    monkeypatch.setattr(sources, "LONG_TEXT_BYTES", 3000)
    monkeypatch.setattr("mpillm.tokens.text.text_blocks.BLOCK_BYTES", 500)
    prepare(dataclasses.replace(options, out=folder / "blocks"), comm, QUIET)
    if comm.rank == 0:
        assert contents(folder / "whole") == contents(folder / "blocks")
    comm.Barrier()


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("change", ["other", "shorter", "more documents"])
def test_a_source_that_changes_is_named(folder, comm, change, long, monkeypatch):
    """On each rank alone: which rank reads the file is not the question."""
    path = folder / f"{comm.rank}{'.txt' if long else '.jsonl'}"
    path.write_text('{"text": "one two three"}\n' * 90)
    if long:
        monkeypatch.setattr(sources, "LONG_TEXT_BYTES", 100)
    pieces = sources.list_pieces([str(path)], "**/*", None, "text", MPI.COMM_SELF, QUIET)
    found = survey(pieces, (str(path),), 0, 1, MPI.COMM_SELF, QUIET)
    line = '{"text": "one two three"}\n'
    path.write_text(
        {"other": line * 89 + '{"text": "one two ThreE"}\n', "shorter": line * 5}.get(
            change, '{"text":""}\n' + line * 89
        )
    )

    def read_again():
        for rows, known in found.read(found.mine, 1):
            for document, key in zip(rows.documents, known["key"].tolist(), strict=True):
                if not isinstance(document, str):
                    list(found.unchanged(document, key))

    with pytest.raises(DataError, match=f"{path.name} changed while it was read; run again"):
        read_again()
    comm.Barrier()


def test_a_line_without_an_end_is_cut_and_said_once(folder, comm, monkeypatch):
    if comm.rank == 0:
        (folder / "a.txt").write_text("abc" * 1000)
    comm.Barrier()
    monkeypatch.setattr("mpillm.tokens.text.text_cut.LONGEST_PART", 500)
    monkeypatch.setattr("mpillm.tokens.text.text_cut.PART_CHARACTERS", 100)
    stream = io.StringIO()
    options = PrepareOptions((str(folder / "a.txt"),), folder / "out", validation=0.0, **SMALL)
    prepare(options, comm, Console(comm.rank == 0, stream))
    assert comm.rank or stream.getvalue().count("long texts were cut") == 1
    assert comm.rank or "at 5 places" in stream.getvalue()
    # A text of one split, in its shard of the lowest number.
    with open_split(folder / "out", "train") as reader:
        reader.read(0, ids := np.empty(reader.split.n_tokens, reader.dtype))
    tokenizer = Manifest.load(folder / "out").load_tokenizer()
    assert tokenizer.decode(ids[:-1]) == "abc" * 1000


@pytest.mark.parametrize("validation", [0.001, 0.1, 0.5, 0.99])
def test_a_long_text_is_cut_where_a_short_one_is(validation):
    chance = np.random.default_rng(8)
    for _ in range(200):
        text = "".join(chance.choice([*"abcdefgh", "\n", " "], int(chance.integers(2, 60))))
        size = int(chance.integers(1, 20))
        blocks = [text[start : start + size] for start in range(0, len(text), size)]
        head, tail = split_blocks(iter(blocks), cut_place(blocks, validation))
        assert ("".join(head), "".join(tail)) == cut_tail(text, validation)


@pytest.mark.parametrize("name", [b"caf\xe9", b"line\nbreak", b"[bold]x \x1b[31m"])
def test_any_name_is_prepared_and_found_again(folder, comm, name):
    source = folder / os.fsdecode(name)
    if comm.rank == 0:
        source.mkdir()
        (source / f"{source.name}.txt").write_bytes(b"some text \xff\n" * 9)
    comm.Barrier()
    options = PrepareOptions((str(source),), folder / f"out-{source.name}", "bytes")
    stream = io.StringIO()
    made = prepare(options, comm, Console(comm.rank == 0, stream))
    again = prepare(options, comm, QUIET)
    assert made.manifest_hash == again.manifest_hash == Manifest.load(options.out).manifest_hash
    assert again.prep["sources"] == [str(source)]
    if comm.rank == 0:
        stream.getvalue().encode()
        assert "\x1b" not in stream.getvalue()
        [line] = [line for line in stream.getvalue().splitlines() if "U+FFFD" in line]
        assert line.endswith("to keep their text")


def test_a_field_is_part_of_the_dataset(folder, comm):
    if comm.rank == 0:
        (folder / "a.jsonl").write_text('{"text": "t one", "body": "b two"}\n' * 40)
    comm.Barrier()
    options = PrepareOptions((str(folder / "a.jsonl"),), folder / "text", "bytes")
    assert "field" not in prepare(options, comm, QUIET).prep
    other = dataclasses.replace(options, out=folder / "body", field="body")
    assert prepare(other, comm, QUIET).prep["field"] == "body"


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_ends_with_one_line_and_leaves_nothing(begin, tmp_path, number):
    (tmp_path / "a.txt").write_text("some words, many times over\n" * 400_000)
    process = begin("prepare", tmp_path / "a.txt", "--out", tmp_path / "out", "--vocab-size", "300")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, output + errors
    assert errors == f"mpillm: interrupted: by {signal.Signals(number).name}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
