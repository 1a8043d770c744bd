"""Mark the fields of a dataclass as options of the command line.

A verb's options are one frozen dataclass. Each field has its type, its default, and its help in a
marker:

    threads: Annotated[int, Option("Threads a rank; 0: its share of the cores.")] = 0

`verbs/command.py` makes the command from the fields; a field without a marker is not an option.
This module imports no command-line library, so every room may mark its own settings.
"""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints


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
