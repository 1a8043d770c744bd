"""Make a command of the command line from a verb's dataclass."""

import ast
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, get_args, get_origin

import typer
from typer.core import TyperCommand

from mpillm.errors import UsageError
from mpillm.system.command_line import Argument, CommandParameter, Option, command_parameters
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
    parameters = list(command_parameters(verb))  # type: ignore[arg-type]

    def call(**given: Any) -> None:
        verb(**{one.name: _to_field(one, given[one.name]) for one in parameters}).run()
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
    if isinstance(marker, Option) and marker.commas:
        kind, default = str, ",".join(one.default or ())
    elif get_origin(kind) is tuple:
        kind, default = list[get_args(kind)[0]] | None, one.default or None  # type: ignore[misc]
    info: Any = (
        typer.Argument(help=marker.help, metavar=marker.metavar or None)
        if isinstance(marker, Argument)
        else typer.Option(one.flag, help=marker.help, metavar=marker.metavar or None)
    )
    return inspect.Parameter(
        one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _to_field(one: CommandParameter, value: Any) -> Any:
    """Give what was typed in the field's own type: tuples where typer has lists."""
    if isinstance(one.marker, Option) and one.marker.commas:
        return tuple(filter(None, value.split(",")))
    return tuple(value or ()) if get_origin(one.kind) is tuple else value
