"""Sources, pieces and documents: cut by bytes, the same for any number of ranks."""

import json

import pytest
from mpi4py import MPI

from mpillm.errors import DataError, UsageError
from mpillm.tokens import sources
from mpillm.tokens.sources import list_pieces, pieces_of_rank, read_piece, read_pieces

pytestmark = pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="no messages: serial pass only")


@pytest.fixture
def own(tmp_path):
    """Give each rank a folder of its own: nothing here is collective."""
    return tmp_path


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
    assert read_piece(piece)[1:] == (["x\ufffd 😀"], 1)


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
