"""Sources, pieces and documents: cut by bytes, the same for any number of ranks."""

import gzip
import io
import json
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.errors import DataError, UsageError
from mpillm.system.console import Console
from mpillm.tokens import sources
from mpillm.tokens.sources import LongText, measure, pieces_of_rank, read_piece, read_pieces
from mpillm.tokens.text import text_blocks

pytestmark = pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="no messages: serial pass only")


@pytest.fixture
def own(tmp_path):
    """Give each rank a folder of its own: nothing here is collective."""
    return tmp_path


def list_pieces(names, glob="**/*", exclude=None, field="text", console=None):
    return sources.list_pieces(
        names, glob, exclude, field, MPI.COMM_SELF, console or Console(False)
    )


def documents(names, **settings):
    return [
        text for piece in list_pieces(names, **settings) for text in read_piece(piece).documents
    ]


def test_a_text_file_is_one_document(own):
    (own / "a.txt").write_text("\ufeffone\ntwo")
    assert documents([str(own / "a.txt")]) == ["one\ntwo"]


def test_a_folder_in_the_order_of_its_names(own):
    for name in ("b/2.txt", "a.md", ".hidden/x.txt", "b/.x", "b/1.txt", "b/blank.txt"):
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_text(name)
    (own / "b/blank.txt").write_text(" \n")
    (own / "b/empty.txt").touch()
    (own / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert documents([str(own)]) == ["a.md", "b/1.txt", "b/2.txt"]
    assert documents([str(own)], glob="*.md") == ["a.md"]
    assert documents([str(own)], exclude=(own / "b").resolve()) == ["a.md"]


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 1 << 20])
def test_jsonl_pieces_hold_what_the_file_holds(own, piece_bytes, monkeypatch):
    texts = ["", "short", "é" * 40, "two\nlines", "😀", "last"]
    path = own / "a.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": t, "id": 1}, ensure_ascii=False) for t in texts) + "\n\n"
    )
    monkeypatch.setattr(sources, "JSONL_PIECE_BYTES", piece_bytes)
    pieces = list_pieces([str(path)])
    assert sum(piece.nbytes for piece in pieces) == path.stat().st_size
    assert [text for texts in read_pieces(pieces, 3) for text in texts.documents] == texts[1:]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 1 << 20])
def test_marked_utf_gives_the_same_documents_in_any_pieces(own, encoding, piece_bytes, monkeypatch):
    texts = ["first", "\u0a0a\u0a0d é 😀", "中" * 30, "last"]
    records = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
    for name, content in (("a.jsonl", records), ("b.txt", "plain\n中 text"), ("c.json", records)):
        (own / name).write_bytes(f"\ufeff{content}".encode(encoding))
    monkeypatch.setattr(sources, "JSONL_PIECE_BYTES", piece_bytes)
    assert documents([str(own)]) == [*texts, "plain\n中 text", *texts]


def test_a_line_in_utf_16_is_named_by_its_number(own):
    path = own / "a.jsonl"
    path.write_bytes('\ufeff{"text": "\u0a0a"}\n\n{"a": 1}\n'.encode("utf-16-le"))
    with pytest.raises(DataError, match=r"a\.jsonl line 3 \(byte 32\) has no string field"):
        documents([str(path)])


def bytes_read():
    """Return the bytes that this process has read by now, by the kernel's count."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_line_over_many_pieces_is_read_about_twice(own, monkeypatch):
    path = own / "a.jsonl"
    path.write_text('{"text": "' + "x" * (8 << 20) + '"}\n{"text": "last"}\n')
    monkeypatch.setattr(sources, "JSONL_PIECE_BYTES", 1 << 16)
    pieces = list_pieces([str(path)])
    assert len(pieces) == 129
    before = bytes_read()
    found = [len(text) for piece in pieces for text in read_piece(piece).documents]
    # Once for the line, once for its end; and the kernel's own count is text, too.
    assert bytes_read() - before < 2.5 * path.stat().st_size
    assert found == [8 << 20, 4]


def test_a_line_beyond_the_limit_is_refused_with_the_number(own, monkeypatch):
    (own / "a.jsonl").write_text('{"text": "ok"}\n{"text": "' + "x" * 5000 + '"}\n')
    monkeypatch.setattr(sources, "LONGEST_RECORD_BYTES", 4000)
    with pytest.raises(DataError, match=r"line 2 \(byte 15\) is longer than 4,000 bytes"):
        documents([str(own / "a.jsonl")])


def test_a_long_text_is_read_in_blocks_and_is_the_same_text(own, monkeypatch):
    text = "some words é 😀\n" * 4000
    (own / "a.txt").write_bytes(f"\ufeff{text}".encode() + b"\xff\xff")
    (own / "b.txt").write_text(" \n" * 9000)
    (own / "c.txt").write_bytes(f"\ufeff{text}".encode("utf-16-be"))
    whole = [measure(text, 3)[:2] for text in documents([str(own)])]
    monkeypatch.setattr(sources, "LONG_TEXT_BYTES", 1000)
    monkeypatch.setattr(text_blocks, "BLOCK_BYTES", 777)
    long = documents([str(own)])
    assert [type(document) for document in long] == [LongText, LongText]
    assert ["".join(document) for document in long] == [f"{text}\ufffd\ufffd", text]
    assert [measure(document, 3)[:2] for document in long] == whole
    assert [measure(document, 3)[2] for document in long] == [2, 0]


@pytest.mark.parametrize("file", ["corpus.jsonl.gz", "picture.png", "array.json", "gone"])
def test_a_named_file_that_is_no_text_is_refused(own, file):
    contents = {
        "corpus.jsonl.gz": gzip.compress(b'{"text": "x"}'),
        "picture.png": b"\x89PNG\r\n\x1a\n\0",
        "array.json": b'[{"text": "x"}]',
    }
    if file in contents:
        (own / file).write_bytes(contents[file])
    with pytest.raises(UsageError, match=f"{file} .*;"):
        list_pieces([str(own / file)])


def test_a_folder_says_what_it_passes_over(own):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        (own / name).write_bytes(gzip.compress(b'{"text": "x"}'))
    (own / "README.txt").write_text("read me")
    (own / "log.txt").write_text('{"text": "x"}\n{"text": "y"}\n')
    (own / "empty").touch()
    stream = io.StringIO()
    pieces = list_pieces([str(own)], console=Console(True, stream))
    assert [piece.path.rpartition("/")[2] for piece in pieces] == ["README.txt", "log.txt"]
    said = stream.getvalue()
    assert "passed over: 2 compressed (.jsonl.gz), 1 empty" in said
    assert "warning: read as plain text, though it looks like JSON lines:" in said
    (own / "README.txt").unlink()
    with pytest.raises(UsageError, match=r"none of its files is text: 2 compressed \(\.jsonl\.gz"):
        list_pieces([str(own)], glob="*.gz")


def test_the_field_of_records(own):
    (own / "a.jsonl").write_text('{"message": {"content": "hi"}}\n')
    assert documents([str(own / "a.jsonl")], field="message.content") == ["hi"]
    with pytest.raises(DataError, match=r"line 1 \(byte 0\) .*`--field message\.content`"):
        documents([str(own / "a.jsonl")])


def test_a_field_without_records_is_said(own):
    (own / "a.txt").write_text("text")
    (own / "b.json").write_text('{"text": "x"}')
    stream = io.StringIO()
    list_pieces([str(own)], field="body", console=Console(True, stream))
    assert 'passed over: 1 JSON without the field "body" (.json)' in stream.getvalue()
    assert "--field body has no effect" in stream.getvalue()


def test_a_size_that_no_file_has_is_refused_with_the_number(own, monkeypatch):
    (own / "a.jsonl").write_text('{"text": "x"}\n' * 99)
    monkeypatch.setattr(sources, "LARGEST_FILE_BYTES", 1000)
    with pytest.raises(UsageError, match=r"a\.jsonl has 1,386 bytes, a source may have 1,000"):
        list_pieces([str(own)])


def test_a_name_with_controls_stays_on_its_line(own):
    path = own / "a\n\x1b[31mb.jsonl"
    path.write_text("{oops\n")
    with pytest.raises(DataError) as caught:
        documents([str(path)])
    assert r"a\n\x1b[31mb.jsonl line 1 (byte 0) isn't JSON" in str(caught.value)


def test_a_file_that_vanishes_is_named(own):
    (own / "a.txt").write_text("a")
    [piece] = list_pieces([str(own)])
    (own / "a.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read the source .*a\.txt: No such file"):
        read_piece(piece)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": 1}', 'no string field "text"'),
        ("[1]", "it is list"),
        ("{oops", "isn't JSON"),
        ('{"a": ""}', "with a"),
    ],
)
def test_a_bad_line_is_named(own, line, says, monkeypatch):
    path = own / "a.jsonl"
    path.write_text('{"text": "fine"}\n' * 3 + line + "\n")
    monkeypatch.setattr(sources, "JSONL_PIECE_BYTES", 20)
    with pytest.raises(DataError, match=r"a\.jsonl line 4 \(byte 51\)") as caught:
        documents([str(path)])
    assert says in str(caught.value)


def test_bytes_that_are_not_utf8_are_replaced_and_counted(own):
    (own / "latin.txt").write_bytes(
        "caf\xe9 \xfc\ufffd".encode("latin-1", "ignore") + "\ufffd".encode()
    )
    [piece] = list_pieces([str(own / "latin.txt")])
    texts = read_piece(piece)
    assert (texts.documents, texts.replaced) == (["caf\ufffd \ufffd\ufffd"], 2)


def test_half_a_surrogate_pair_in_json_is_replaced(own):
    (own / "a.jsonl").write_text('{"text": "x\\ud83d \\ud83d\\ude00"}')
    [piece] = list_pieces([str(own / "a.jsonl")])
    assert read_piece(piece)[1:] == (["x\ufffd 😀"], 0, 1)


def test_missing_and_empty_sources(own):
    with pytest.raises(UsageError, match="no source nowhere"):
        list_pieces(["nowhere"])
    with pytest.raises(UsageError, match="empty: no file matches"):
        list_pieces([str(own)])
    (own / "a.txt").touch()
    with pytest.raises(UsageError, match="empty: it has no bytes"):
        list_pieces([str(own / "a.txt")])
    with pytest.raises(UsageError, match="is not a pattern"):
        list_pieces([str(own)], glob="/etc/*")
    with pytest.raises(UsageError, match="1 to 65,536 sources, got 0"):
        list_pieces([])


def test_the_standard_library():
    pieces = list_pieces(["stdlib"])
    assert 8e6 < sum(piece.nbytes for piece in pieces) < 20e6
    assert not [
        piece for piece in pieces if "/test/" in piece.path or "site-packages" in piece.path
    ]
    assert any(piece.path.endswith("/json/decoder.py") for piece in pieces)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_the_shares_are_all_pieces_once_and_fair(size):
    pieces = list_pieces(["stdlib"])
    shares = [pieces_of_rank(pieces, rank, size) for rank in range(size)]
    assert [number for one in shares for number in one] == list(range(len(pieces)))
    largest = max(piece.nbytes for piece in pieces)
    fair = sum(piece.nbytes for piece in pieces) / size
    assert max(sum(pieces[i].nbytes for i in one) for one in shares) <= fair + largest
