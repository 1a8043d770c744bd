"""The command line: find the verb, run it, and print typing errors. The help loads no room."""

import os
import sys
import time
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mpillm.errors import MpillmError
from mpillm.launch.launchers import is_one_of_several
from mpillm.system.ending_signals import INTERRUPTED
from mpillm.system.messages import printable
from mpillm.system.plugins import is_plugin, load_plugin
from mpillm.system.standard_streams import guard_streams, refuse_lost_output
from mpillm.verbs.command import make_command, verb_summary
from mpillm.verbs.verb_catalog import VERBS

# A launcher kills all ranks once one leaves with an error: the first rank must print before that.
OTHERS_WAIT_SECONDS = 3.0


class _Verbs(TyperGroup):
    """The verbs by name; a verb's file is imported when it is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name) for name in VERBS}

    def list_commands(self, ctx: Any) -> list[str]:
        for name, target in VERBS.items():
            self.commands[name].help = verb_summary(target)
        return list(VERBS)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str, Any, list[str]]:
        name = args[0]
        if not is_plugin(name):
            super().resolve_command(ctx, args)  # raises, with the nearest name, for an unknown one
        return name, make_command(name, load_plugin(name, VERBS, "verb")), args[1:]


app = typer.Typer(
    cls=_Verbs,
    name="mpillm",
    help="Train large language models on classic HPC clusters, over MPI alone. "
    "Each verb runs with or without mpirun.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _versions(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version (with --verbose: of all parts).")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print more.")] = False,
) -> None:
    if version:
        from mpillm.system.versions import print_versions

        print_versions(verbose)
        raise typer.Exit


def main() -> None:
    """Run the command line; the first rank alone prints help and mistakes in typing."""
    silent = is_one_of_several(os.environ)
    guard_streams(mute=silent)
    try:
        if (code := app(standalone_mode=False)) == 0:  # printed help: a verb returns nothing
            refuse_lost_output()
    except typer.Abort:  # Ctrl-C before a verb catches it
        code = INTERRUPTED
    except Exception as failure:
        # What was typed is wrong on every rank; any other failure may be this rank's alone.
        typed = hasattr(failure, "show")
        if silent and (typed or isinstance(failure, MpillmError)):
            # Where all ranks fail alike, the launcher has ended this one when the wait is over.
            time.sleep(OTHERS_WAIT_SECONDS)
        if not silent or not typed:
            _print_failure(failure)
        code = getattr(failure, "exit_code", 1)
    sys.exit(code)


def _print_failure(failure: Any) -> None:
    if hasattr(failure, "show"):
        failure.message = printable(failure.message)[:1000]
        failure.show()
        return
    from mpillm.comm.failure import fail_together

    with fail_together(None, debug="--debug" in sys.argv):
        raise failure
