"""A file is known by its first bytes; each kind that is no text has a remedy that works."""

import bz2
import codecs
import gzip
import io
import lzma
import shutil
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.system.plain_files import encoding_of
from mpillm.tokens.text.examine import examine
from mpillm.tokens.text.file_kinds import (
    SURE_MARKS,
    WORD_MARKS,
    cure,
    kind_of,
    special_kind,
)

pytestmark = pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="no messages: serial pass only")

TEXT = b"some words of text\n" * 20


def zipped(data: bytes) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("a.txt", data)
    return file.getvalue()


def tarred(data: bytes) -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as archive:
        (entry := tarfile.TarInfo("a.txt")).size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


MADE = {
    "gzip": gzip.compress(TEXT),
    "bzip2": bz2.compress(TEXT),
    "xz": lzma.compress(TEXT),
    "zip": zipped(TEXT),
    "tar": tarred(TEXT),
}


@pytest.mark.parametrize("name", MADE)
def test_what_programs_write_is_recognized(name: str) -> None:
    kind = kind_of(MADE[name])
    assert kind is not None
    assert kind.name == name


@pytest.mark.parametrize("marks", [SURE_MARKS, WORD_MARKS])
def test_every_mark_is_found_and_has_a_remedy(marks, tmp_path) -> None:
    for offset, mark, kind in marks:
        head = (b"BZh9" if kind.name == "bzip2" else b"\0" * offset) + mark + b"\0\1\2"
        assert kind_of(head) == kind
        assert len(cure(kind, tmp_path / "file")) > 10


def test_text_that_begins_with_a_word_of_a_kind_is_text() -> None:
    for word in (b"PAR1 is here", b"RIFF and raff", b"MZ", b"BZhello", b"ID3 tags", b"1AY&SY"):
        assert kind_of(word + TEXT) is None
    assert kind_of(b"caf\xe9 \xfc\n") is None
    assert kind_of(b"") is None
    assert kind_of(b"\x1b[31mred\x1b[0m log\n") is None


def test_binary_and_unmarked_utf_16() -> None:
    names = [
        kind.name if (kind := kind_of(data)) else ""
        for data in (
            b"text\0text",
            np.random.default_rng(0).bytes(3000).replace(b"\0", b"x"),
            "words of Windows".encode("utf-16-le"),
            "words of Java".encode("utf-16-be"),
        )
    ]
    unmarked = [f"UTF-16{order} without a byte-order mark" for order in ("LE", "BE")]
    assert names == ["binary", "binary", *unmarked]


def test_a_byte_order_mark_decides() -> None:
    for encoding, mark in (
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("utf-32-be", codecs.BOM_UTF32_BE),
    ):
        data = mark + "a 中".encode(encoding)
        assert encoding_of(data) == (encoding, len(mark))
        assert kind_of(data) is None
    assert encoding_of(b"a") == ("utf-8", 0)


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("kind", "file", "made"),
    [
        ("gzip", "a b.txt.gz", "a b.txt"),
        ("gzip", "-corpus.txt", "-corpus.plain.txt"),
        ("gzip", "it's.jsonl", "it's.plain.jsonl"),
        ("bzip2", "a.txt.bz2", "a.txt"),
        ("xz", "a.txt.xz", "a.txt"),
        ("tar", "some.tar", "a.txt"),
        ("zip", "some.zip", "a.txt"),
        ("utf-16", "win.txt", "win.plain.txt"),
    ],
)
def test_the_remedy_makes_the_text(kind: str, file: str, made: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = MADE.get(kind) or TEXT.decode().encode("utf-16-le")
    path = Path(file)
    path.write_bytes(data)
    remedy = examine(str(path), True, "text").remedy
    line = remedy.split("`")[1]
    if not shutil.which(line.split()[0]):
        pytest.skip(f"{line.split()[0]} is not installed")
    subprocess.run(["bash", "-c", line], check=True, timeout=20)
    assert (tmp_path / made).read_bytes() == TEXT
    assert path.read_bytes() == data


def test_special_files_by_their_mode() -> None:
    kinds = [special_kind(mode).group for mode in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR)]
    assert kinds == ["pipe", "socket", "device"]


@pytest.mark.parametrize(
    ("name", "text", "lines", "kind"),
    [
        ("a.jsonl", "{}", True, ""),
        ("a.ndjson", '{"text": "x"}', True, ""),
        ("a.json", '{"text": "x"}\n{"text": "y"}', True, ""),
        ("a.json", '\n\n {"text": "x"}', True, ""),
        ("a.json", '[{"text": "x"}]', False, "one JSON array"),
        ("a.json", '{\n "text": "x"\n}', False, "JSON that isn't a record a line"),
        ("a.txt", '{"text": "x"}\n', False, ""),
    ],
)
def test_json_by_its_first_record(name: str, text: str, lines: bool, kind: str, tmp_path) -> None:
    for encoding in ("utf-8", "utf-16", "utf-32"):
        (tmp_path / name).write_text(text, encoding=encoding)
        facts = examine(str(tmp_path / name), True, "text")
        assert (facts.lines, facts.kind.name if facts.kind else "") == (lines, kind)
        assert facts.suspect == name.endswith(".txt")


def test_no_remedy_takes_a_path_for_an_option(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-a.json").write_text("[1]")
    remedy = examine("-a.json", True, "text").remedy
    assert remedy == "write a record a line: `jq -c '.[]' ./-a.json > -a.plain.jsonl`"


def test_json_found_among_other_files_needs_the_field(tmp_path) -> None:
    (tmp_path / "conf.json").write_text('{"version": 1}\n')
    named, found = (examine(str(tmp_path / "conf.json"), named, "text") for named in (True, False))
    assert (named.lines, named.kind) == (True, None)
    assert found.kind is not None
    assert found.kind.group == 'JSON without the field "text"'


def test_a_file_that_vanished_or_has_no_size(tmp_path) -> None:
    assert "No such file" in examine(str(tmp_path / "gone"), False, "text").failure
    facts = examine("/proc/self/status", True, "text")
    assert facts.kind is not None
    assert facts.remedy.startswith("copy it first")
