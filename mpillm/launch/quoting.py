"""Words for shell scripts and for the directives of batch systems: safe by construction, or refused with the rule."""

import re
from typing import Any

from mpillm.errors import UsageError

# "=" and "," are left out for shellcheck's sake, which takes them for slips where they stand bare in an array.
_PLAIN = re.compile(r"[A-Za-z0-9@%+:./_-]+", re.ASCII)
_SPECIAL = re.compile(r"([$`'\\‘’])")
# The C0 and C1 controls, and halves of characters, which no file name of UTF-8 can hold.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

# What may stand in a directive, where no shell quotes: (pattern, the rule in words).
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
    """Text that goes into a script as it is: checked against a pattern, or quoted already."""

    __slots__ = ()


def checked(value: str, rule: tuple[str, str], what: str) -> Verbatim:
    """The value, fit to stand bare. Raises UsageError with the rule that it breaks."""
    pattern, words = rule
    if not re.fullmatch(pattern, value, re.ASCII):
        raise UsageError(f"{what} {words}, and {value!r} does not")
    return Verbatim(value)


def check_text(value: str, what: str) -> str:
    """Any text but control characters. Raises UsageError."""
    if found := _CONTROL.search(value):
        raise UsageError(
            f"{what} {value!r} holds {found.group()!r}; line breaks, control characters and bytes that are no UTF-8 "
            "can't stand in a batch script, so choose another name"
        )
    return value


def quote(text: str) -> Verbatim:
    """One word of bash that stands for `text`, whatever it holds but control characters.

    What is special even between quotes stands outside of them, behind a backslash: so it holds in any locale, and
    shellcheck sees that `$` is meant. Typographic quotes, which it takes for slips, stand between the other kind.
    """
    if _PLAIN.fullmatch(text):
        return Verbatim(text)
    return Verbatim("".join(_quoted(piece) for piece in _SPECIAL.split(text) if piece) or "''")


def _quoted(piece: str) -> str:
    if piece in ("‘", "’"):
        return f'"{piece}"'
    return f"\\{piece}" if _SPECIAL.fullmatch(piece) else f"'{piece}'"


def finalize(value: Any) -> str:
    """What a template's `{{ … }}` becomes: numbers and Verbatim as they are, any other text as one quoted word."""
    if isinstance(value, Verbatim):
        return value
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"a template may write text and whole numbers, not {value!r}")
    return str(value) if isinstance(value, int) else quote(check_text(value, "the text"))
