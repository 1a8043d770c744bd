"""Recognize a file by its first bytes, as file(1) does: what is no text is refused or passed over.

A name decides little: a compressed file may be called corpus.txt.
"""

import re
import stat
from dataclasses import dataclass
from pathlib import Path

from mpillm.system.messages import command
from mpillm.system.plain_files import encoding_of

# Git's rule: a file with a zero byte near its start isn't text.
HEAD_BYTES = 8000
# Controls that text has no use for. Compressed and encrypted bytes hold one in ten, text next to
# none; a terminal's log holds some.
CONTROLS = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f]")
FEWEST_CONTROLS, CONTROL_SHARE = 8, 1 / 20


@dataclass(frozen=True)
class FileKind:
    """A kind of file that is no text: its name in a message, and its group in a count of many."""

    name: str
    group: str


# (offset, bytes, kind). All of these hold bytes that no text holds, or are long enough.
SURE_MARKS = (
    (0, b"\x1f\x8b", FileKind("gzip", "compressed")),
    (0, b"\x1f\x9d", FileKind("compress", "compressed")),
    (0, b"\x28\xb5\x2f\xfd", FileKind("zstd", "compressed")),
    (0, b"\xfd7zXZ\0", FileKind("xz", "compressed")),
    (0, b"\x04\x22\x4d\x18", FileKind("lz4", "compressed")),
    (0, b"LZIP\x01", FileKind("lzip", "compressed")),
    (0, b"\xff\x06\0\0sNaPpY", FileKind("snappy", "compressed")),
    (4, b"1AY&SY", FileKind("bzip2", "compressed")),
    (0, b"PK\x03\x04", FileKind("zip", "archive")),
    (0, b"PK\x05\x06", FileKind("zip", "archive")),
    (0, b"7z\xbc\xaf\x27\x1c", FileKind("7z", "archive")),
    (0, b"Rar!\x1a\x07", FileKind("rar", "archive")),
    (257, b"ustar", FileKind("tar", "archive")),
    (0, b"\x89HDF\r\n\x1a\n", FileKind("HDF5", "table or array")),
    (0, b"SQLite format 3\0", FileKind("SQLite", "table or array")),
    (0, b"\x93NUMPY", FileKind("NumPy", "table or array")),
    (0, b"Obj\x01", FileKind("Avro", "table or array")),
    (0, b"%PDF-", FileKind("PDF", "document")),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", FileKind("old Office", "document")),
    (0, b"\x89PNG\r\n\x1a\n", FileKind("PNG", "picture or sound")),
    (0, b"\xff\xd8\xff", FileKind("JPEG", "picture or sound")),
    (0, b"\x7fELF", FileKind("ELF", "program")),
    (0, b"\0asm", FileKind("WebAssembly", "program")),
    (0, b"\xca\xfe\xba\xbe", FileKind("Java class", "program")),
)
# A text may begin with these words, so they count only where the rest is binary.
WORD_MARKS = (
    (0, b"PAR1", FileKind("Parquet", "table or array")),
    (0, b"ARROW1", FileKind("Arrow", "table or array")),
    (0, b"FEA1", FileKind("Feather", "table or array")),
    (0, b"ORC", FileKind("ORC", "table or array")),
    (0, b"GGUF", FileKind("GGUF", "weights")),
    (0, b"GIF8", FileKind("GIF", "picture or sound")),
    (0, b"RIFF", FileKind("RIFF (WebP, WAV, AVI)", "picture or sound")),
    (4, b"ftyp", FileKind("MP4", "picture or sound")),
    (0, b"ID3", FileKind("MP3", "picture or sound")),
    (0, b"OggS", FileKind("Ogg", "picture or sound")),
    (0, b"fLaC", FileKind("FLAC", "picture or sound")),
    (0, b"MZ", FileKind("Windows program", "program")),
)
BINARY = FileKind("binary", "binary")
# The commonest case of bytes that alternate with zeros: Windows without its mark.
UNMARKED = {
    "UTF-16LE": FileKind("UTF-16LE without a byte-order mark", "unmarked UTF-16"),
    "UTF-16BE": FileKind("UTF-16BE without a byte-order mark", "unmarked UTF-16"),
}

# How each program unpacks: its words, and the endings of names that it takes.
UNPACKERS = {
    "gzip": (("gunzip", "-k"), (".gz", ".tgz"), ("gzip", "-dc")),
    "compress": (("gunzip", "-k"), (".Z",), ("gzip", "-dc")),
    "zstd": (("zstd", "-d"), (".zst",), ("zstd", "-dc")),
    "xz": (("unxz", "-k"), (".xz",), ("xz", "-dc")),
    "lz4": (("lz4", "-d"), (".lz4",), ("lz4", "-dc")),
    "lzip": (("lzip", "-dk"), (".lz",), ("lzip", "-dc")),
    "bzip2": (("bunzip2", "-k"), (".bz2",), ("bzip2", "-dc")),
    "zip": (("unzip",), (), ()),
    "7z": (("7z", "x"), (), ()),
    "rar": (("unrar", "x"), (), ()),
    "tar": (("tar", "-xf"), (), ()),
}
PANDAS = {"Parquet": "parquet", "Arrow": "feather", "Feather": "feather", "ORC": "orc"}


def kind_by_mark(head: bytes) -> FileKind | None:
    """Recognize a kind that is no text by a mark that no text has."""
    for offset, mark, kind in SURE_MARKS:
        # "1AY&SY" alone might be text: bzip2 writes "BZh" and a digit before it.
        found = head[offset : offset + len(mark)] == mark
        if found and (kind.name != "bzip2" or head.startswith(b"BZh")):
            return kind
    return None


def kind_of(head: bytes) -> FileKind | None:
    """Recognize the kind of a file that begins with `head`; None for text. Marked UTF is text."""
    if kind := kind_by_mark(head):
        return kind
    if encoding_of(head)[1] or not _is_binary(head):
        return None
    for offset, mark, kind in WORD_MARKS:
        if head[offset : offset + len(mark)] == mark:
            return kind
    return _unmarked(head) or BINARY


def _is_binary(head: bytes) -> bool:
    controls = len(CONTROLS.findall(head))
    return b"\0" in head or controls >= max(FEWEST_CONTROLS, CONTROL_SHARE * len(head))


def _unmarked(head: bytes) -> FileKind | None:
    """Recognize Western text in UTF-16 without a mark: nearly every second byte is zero."""
    half = len(head) // 2
    even, odd = head[0 : 2 * half : 2].count(0), head[1 : 2 * half : 2].count(0)
    if half and min(even, odd) == 0 and max(even, odd) > 0.7 * half:
        return UNMARKED["UTF-16LE" if odd else "UTF-16BE"]
    return None


def special_kind(mode: int) -> FileKind:
    """Name what is neither a plain file nor a folder, by its mode."""
    for is_kind, group in (
        (stat.S_ISFIFO, "pipe"),
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISCHR, "device"),
        (stat.S_ISBLK, "device"),
    ):
        if is_kind(mode):
            return FileKind(f"a {group}", group)
    return FileKind("an open file of a process", "open file of a process")


def cure(kind: FileKind, path: Path) -> str:
    """Say how to make text of the file, by a command that can be pasted where there is one."""
    if kind.name in UNPACKERS:
        return f"unpack it: `{_unpack(kind.name, path)}`"
    if kind.name in PANDAS:
        to = str(path.with_suffix(".jsonl"))
        program = (
            f"import pandas; pandas.read_{PANDAS[kind.name]}({str(path)!r})"
            f".to_json({to!r}, orient='records', lines=True)"
        )
        return f"write it as JSON lines: `{command(['python', '-c', program])}`"
    if kind.name == "PDF":
        return f"extract its text: `{command(['pdftotext', argument(path)])}`"
    for encoding, unmarked in UNMARKED.items():
        if kind == unmarked:
            words = command(["iconv", "-f", encoding, "-t", "UTF-8", argument(path)])
            return f"convert it: `{words} > {command([renamed(path)])}`"
    if kind.group in ("table or array", "document"):
        return "write its text as JSON lines or plain text first"
    return "leave it out, or name the text that it was made from"


def _unpack(name: str, path: Path) -> str:
    words, endings, to_output = UNPACKERS[name]
    if path.name.endswith((".tgz", ".tar", ".tar" + path.suffix)):
        return command(["tar", "-xf", argument(path)])
    if not endings or path.suffix in endings:
        return command([*words, argument(path)])
    # These programs take a file by its ending alone; from standard input they take anything.
    return f"{command(to_output)} < {command([path])} > {command([renamed(path)])}"


def renamed(path: Path, suffix: str = "") -> Path:
    """Name a new file next to `path`: corpus.txt → corpus.plain.txt."""
    return path.with_name(f"{path.stem}.plain{suffix or path.suffix or '.txt'}")


def argument(path: Path) -> str:
    """Write a path so that no program takes it for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)
