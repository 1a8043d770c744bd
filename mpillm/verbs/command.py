"""Make a command of the command line from a verb's dataclass."""

import ast
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, cast, get_args, get_origin

import typer
from typer.core import TyperCommand

from mpillm.errors import UsageError
from mpillm.system.command_line import Argument, CommandParameter, Option, command_parameters
from mpillm.system.ending_signals import interrupt_on_signals
from mpillm.system.standard_streams import refuse_lost_output
from mpillm.verbs.verb_catalog import REFUSED


class Verb(Protocol):
    """Describe a verb: a frozen dataclass with its options as fields.

    `prints_its_result` (true where a verb does not say): the verb has failed where its output
    cannot be written. Else its files are the result, and the verb continues.
    """

    example: ClassVar[str]

    def run(self) -> None:
        """Do the work; every rank calls it. Print and leave by `verbs/job.py` where it fails."""


class _VerbCommand(TyperCommand):
    """A command that names the new spelling of an option that was renamed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = args[: args.index("--")] if "--" in args else args
        for word in own:
            spelling = word.partition("=")[0]
            if new := REFUSED.get((str(self.name), spelling)):
                raise UsageError(f"{self.name} {spelling} is called {new} now")
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


def make_command(name: str, verb: Callable[..., Verb]) -> Any:
    """Make the command `name`: it builds `verb` from what was typed and calls its `run`.

    `verb` is a dataclass. The command raises what its constructor raises, before MPI is loaded.
    """
    if not (isinstance(verb, type) and is_dataclass(verb) and callable(getattr(verb, "run", None))):
        raise UsageError(
            f"the verb {name} must name a dataclass with a method run, and not {verb!r:.80}; "
            "docs/extending.md has an example"
        )
    kind = cast("Callable[..., Verb]", verb)
    try:
        parameters = list(command_parameters(verb))
    except (NameError, TypeError) as failure:
        raise UsageError(f"the options of the verb {name} cannot be read: {failure}") from failure

    def call(**given: Any) -> None:
        values = {one.name: _to_field(one, given[one.name]) for one in parameters}
        for one in parameters:
            one.check(values[one.name])
        made: Verb = kind(**values)
        interrupt_on_signals()
        made.run()
        if getattr(verb, "prints_its_result", True):
            refuse_lost_output()

    # typer reads a function's signature; this one has the dataclass's fields as parameters.
    signature = [_signature_parameter(one) for one in parameters]
    call.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in signature}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    example = getattr(verb, "example", "")
    epilog = f"Example: {example}" if example else None
    app.command(name, cls=_VerbCommand, help=inspect.getdoc(verb), epilog=epilog)(call)
    return typer.main.get_command(app)


def verb_summary(target: str) -> str:
    """Give the first paragraph of a verb's docstring, read from its file: nothing of the verb is
    imported.
    """
    module, _, name = target.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return " ".join((ast.get_docstring(found) or "").partition("\n\n")[0].split())


def _signature_parameter(one: CommandParameter) -> inspect.Parameter:
    kind, marker = one.kind, one.marker
    default = inspect.Parameter.empty if one.required else one.default
    # A path is taken as a text: typer would make the current folder of an empty one.
    whole = Path in (kind, *get_args(kind))
    if isinstance(marker, Option) and marker.commas:
        kind, default = str, ",".join(one.default or ())
    elif get_origin(kind) is tuple:
        item = str if whole else get_args(kind)[0]
        kind, default = list[item] | None, one.default or None  # type: ignore[valid-type]
    elif whole:
        kind = str if kind is Path else str | None
        default = str(default) if isinstance(default, Path) else default
    metavar = marker.metavar or ("PATH" if whole else None)
    info: Any = (
        typer.Argument(help=marker.help, metavar=metavar)
        if isinstance(marker, Argument)
        else typer.Option(one.flag, help=_help(marker), metavar=metavar)
    )
    return inspect.Parameter(
        one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _help(marker: Option) -> str:
    """Give the help with the range of the numbers, as `Rounds that are timed (1 or more).`."""
    return f"{marker.help.removesuffix('.')} ({marker.range})." if marker.range else marker.help


def _to_field(one: CommandParameter, value: Any) -> Any:
    """Give what was typed in the field's own type: tuples where typer has lists, and paths."""
    if isinstance(one.marker, Option) and one.marker.commas:
        return tuple(filter(None, value.split(",")))
    if Path in (one.kind, *get_args(one.kind)):
        items = [_to_path(one, text) for text in (value if isinstance(value, list) else [value])]
        return items[0] if get_origin(one.kind) is not tuple else tuple(filter(None, items))
    return tuple(value or ()) if get_origin(one.kind) is tuple else value


def _to_path(one: CommandParameter, text: str | None) -> Path | None:
    if text == "":
        raise UsageError(f"{one.title} is empty; name a path (is a shell variable unset?)")
    return None if text is None else Path(text)
