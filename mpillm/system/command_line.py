"""Mark the fields of a dataclass as options of the command line.

A verb's options are one frozen dataclass. Each field has its type, its default, and its help in a
marker:

    threads: Annotated[int, Option("Threads a rank; 0: its share of the cores.")] = 0

`verbs/command.py` makes the command from the fields; a field without a marker is not an option. It
checks what was typed against the range of the marker, which the help shows.
This module imports no command-line library, so every room may mark its own settings.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from mpillm.errors import UsageError

# Linux's NAME_MAX and PATH_MAX, less the byte that ends a path.
NAME_BYTES, PATH_BYTES = 255, 4095
# A message stays on a few lines whatever was typed.
SHOWN_LETTERS = 60


@dataclass(frozen=True)
class Option:
    """Mark a field as an option."""

    help: str
    metavar: str = ""
    """The name of its value in the help; "": the type's."""
    flag: str = ""
    """Its spelling, such as `--set` or `--here/--there`; "": the field's name with dashes."""
    commas: bool = False
    """For a tuple of texts: given once, its values separated by commas."""
    minimum: float | None = None
    """The smallest number; None: none is too small."""
    maximum: float | None = None
    """The largest number; None: the largest of 64 bits for an integer."""
    finite: bool = True
    """Refuse nan and the infinities."""

    @property
    def range(self) -> str:
        """Describe the numbers that it takes, such as `1 to 1,000`; "" without a range."""
        low, high = self.minimum, self.maximum
        if low is None:
            return "" if high is None else f"{_number(high)} or less"
        return f"{_number(low)} or more" if high is None else f"{_number(low)} to {_number(high)}"


@dataclass(frozen=True)
class Argument:
    """Mark a field as a positional argument."""

    help: str
    metavar: str = ""


@dataclass(frozen=True)
class CommandParameter:
    """Describe one option or argument: the field's name, type and default, if any."""

    name: str
    kind: Any
    marker: Option | Argument
    default: Any
    required: bool

    @property
    def flag(self) -> str:
        """The spelling of an option."""
        own = self.marker.flag if isinstance(self.marker, Option) else ""
        return own or "--" + self.name.replace("_", "-")

    @property
    def title(self) -> str:
        """The name that messages give it: the option's spelling, or the argument's place."""
        if isinstance(self.marker, Option):
            return self.flag
        return self.marker.metavar or self.name.upper()

    def check(self, value: Any) -> None:
        """Raise UsageError for a value that no verb can use.

        That is a number out of its range, and a path that no file system takes. Without this check
        they fail later, in words that name no option.
        """
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, str | Path):
                _check_text(self.title, one, isinstance(one, Path))
            elif isinstance(one, int | float) and not isinstance(one, bool):
                _check_number(self.title, one, self.marker)


def _check_text(title: str, value: str | Path, is_path: bool) -> None:
    text = str(value)
    if "\0" in text:
        raise UsageError(f"{title} holds a NUL byte, {_short(text)!r}; take it out")
    if not is_path:
        return
    try:
        os.fsencode(text)
    except UnicodeEncodeError as failure:
        raise UsageError(f"{title} {_short(text)!a} is no name of a file: {failure}") from failure
    longest = max((len(os.fsencode(name)) for name in text.split("/")), default=0)
    if longest > NAME_BYTES or len(os.fsencode(text)) > PATH_BYTES:
        raise UsageError(
            f"{title} {_short(text)!r} is too long: a name has at most {NAME_BYTES} bytes and a "
            f"path {PATH_BYTES:,}, not {longest:,} and {len(os.fsencode(text)):,}; shorten it"
        )


def _check_number(title: str, value: float, marker: Option | Argument) -> None:
    option = marker if isinstance(marker, Option) else Option("")
    low, high = option.minimum, option.maximum
    if isinstance(value, float) and not math.isfinite(value):
        if option.finite:
            words = f", {option.range}" if option.range else ""
            raise UsageError(f"{title} takes a finite number{words}, and not {value}")
        return
    # A larger integer overflows in whatever reads it: NumPy, torch, HDF5, MPI.
    widest = (1 << 63) - 1 if isinstance(value, int) else math.inf
    too_low = value < (-widest if low is None else low)
    too_high = value > (widest if high is None else high)
    if too_low or too_high:
        words = option.range or f"{-widest:,} to {widest:,}"
        raise UsageError(f"{title} takes {words}, and not {_shown(value)}")


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}…"


def _shown(value: float) -> str:
    """Write a number on one line; Python refuses to write more than 4,300 digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length():,} bits"
    return str(value)


def _number(value: float) -> str:
    return f"{value:,}"


Debug = Annotated[bool, Option("Show tracebacks of errors.")]
Json = Annotated[bool, Option("Print one JSON object instead of a table.", flag="--json")]


def command_parameters(options: type) -> Iterator[CommandParameter]:
    """Yield the marked fields of a dataclass in their order, those of its bases first."""
    hints = get_type_hints(options, include_extras=True)
    for field in fields(options):
        hint = hints[field.name]
        if get_origin(hint) is not Annotated:
            continue
        kind, *markers = get_args(hint)
        for marker in markers:
            if isinstance(marker, Option | Argument):
                required = field.default is MISSING
                default = None if required else field.default
                yield CommandParameter(field.name, kind, marker, default, required)


def check_options(options: Any) -> None:
    """Raise UsageError for an option of a dataclass that is out of its range.

    For a library's call: what is typed is checked before the dataclass is made.
    """
    for one in command_parameters(type(options)):
        one.check(getattr(options, one.name))
