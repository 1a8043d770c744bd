"""Text files as editors and shells write them: marks, encodings, and files without an end."""

from pathlib import Path

import pytest

from mpillm.system.json_text import read_json
from mpillm.system.plain_files import is_plain_name, read_text

TEXT = 'key = "größe 日本"\n'


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"]
)
def test_a_mark_says_the_encoding(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    (tmp_path / "a.toml").write_bytes((mark + TEXT).encode(encoding))
    assert read_text(tmp_path / "a.toml") == TEXT


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a = 1\n\xe9", "byte 6 is not UTF-8; save it as UTF-8"),
        (b"\xff\xfea", "byte 2 is not UTF-16"),
        (b"\xef\xbb\xbfa\xe9", "byte 4 is not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_text(tmp_path / "a", 100)


@pytest.mark.parametrize("path", ["/dev/zero", "."])
def test_a_device_without_an_end_is_not_read(path: str) -> None:
    with pytest.raises(OSError, match="should be a plain file"):
        read_text(Path(path), 1000)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 101)
    with pytest.raises(OSError, match="it is larger than 100 bytes"):
        read_text(tmp_path / "a", 100)
    with (tmp_path / "a").open("rb") as file:
        given = Path(f"/proc/self/fd/{file.fileno()}")
        with pytest.raises(OSError, match="it is larger than 100 bytes"):
            read_text(given, 100)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("train-00000.h5", True),
        ("größe", True),
        ("x" * 255, True),
        ("x" * 256, False),
        ("", False),
        (".", False),
        ("..", False),
        (".hidden", False),
        ("a/b", False),
        ("a\\b", False),
        ("a\0b", False),
        ("a\nb", False),
        (3, False),
    ],
)
def test_the_name_of_a_file_in_a_folder(name: object, plain: bool) -> None:
    assert is_plain_name(name) == plain


def test_json_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('{"a": [1]}'.encode("utf-8-sig"))
    assert read_json(tmp_path / "a.json") == {"a": [1]}
