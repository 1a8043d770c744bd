"""Values for shell scripts and batch directives: quoted, or refused with the rule."""

import re
from typing import Any

from mpillm.errors import UsageError

# "=" and "," are quoted although bash needs no quotes: in an array shellcheck takes them for
# mistakes.
_PLAIN = re.compile(r"[A-Za-z0-9@%+:./_-]+", re.ASCII)
_SPECIAL = re.compile(r"([$`'\\‘’])")
# The C0 and C1 controls, and halves of characters, which no file name of UTF-8 can hold.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

# Values of directives, where no shell removes quotes: (pattern, the rule in words).
NAME = (
    r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}",
    "starts with a letter or a digit and has up to 63 of A-Z a-z 0-9 _ . -",
)
WORD = (r"[A-Za-z0-9_][A-Za-z0-9_.,@+/:-]*", "is a word of A-Z a-z 0-9 _ . , @ + / : -")
CONSTRAINT = (
    r"[A-Za-z0-9_\[(!][A-Za-z0-9_.,:=<>&|*!()\[\]-]*",
    "has no space and only A-Z a-z 0-9 _ . , : = < > & | * ! ( ) [ ] -",
)
DIRECTIVE = (
    r"-[!-~]([ -~]*[!-~])?",
    "starts with - and is one line of plain ASCII, such as --exclusive",
)
MODULE = (
    r"[A-Za-z0-9_][A-Za-z0-9_.+/@~=:-]*",
    "is a word of A-Z a-z 0-9 _ . + / @ ~ = : -, such as OpenMPI/5.0.5",
)
VARIABLE = (r"[A-Za-z_][A-Za-z0-9_]*", "starts with a letter or _ and has only A-Z a-z 0-9 _")


class Verbatim(str):
    """Text for a script without further quotes: checked against a pattern, or quoted already."""

    __slots__ = ()


def checked(value: str, rule: tuple[str, str], what: str) -> Verbatim:
    """Check the value of a directive. Raises UsageError with the rule that it breaks."""
    pattern, words = rule
    if not re.fullmatch(pattern, value, re.ASCII):
        raise UsageError(f"{what} {words}, and {value!r} does not")
    return Verbatim(value)


def check_text(value: str, what: str) -> str:
    """Refuse text with control characters. Raises UsageError."""
    if found := _CONTROL.search(value):
        raise UsageError(
            f"{what} {value!r} holds {found.group()!r}; a batch script cannot hold line breaks, "
            "control characters or bytes outside of UTF-8, so choose another name"
        )
    return value


def quote(text: str) -> Verbatim:
    """Quote `text` as one word of bash; it may hold anything but control characters.

    Characters that are special between quotes get a backslash outside of them: this holds in any
    locale, and shows shellcheck that `$` is meant. Typographic quotes are put between double ones,
    for shellcheck takes them for mistakes.
    """
    if _PLAIN.fullmatch(text):
        return Verbatim(text)
    return Verbatim("".join(_quoted(piece) for piece in _SPECIAL.split(text) if piece) or "''")


def _quoted(piece: str) -> str:
    if piece in ("‘", "’"):
        return f'"{piece}"'
    return f"\\{piece}" if _SPECIAL.fullmatch(piece) else f"'{piece}'"


def finalize(value: Any) -> str:
    """Write the value of a template's `{{ … }}`: numbers and Verbatim as they are, text quoted."""
    if isinstance(value, Verbatim):
        return value
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"a template may write text and whole numbers, not {value!r}")
    return str(value) if isinstance(value, int) else quote(check_text(value, "the text"))
