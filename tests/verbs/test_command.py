"""A verb is a dataclass: its fields become options, its docstring the help, and nothing is declared
twice.
"""

import importlib
import keyword
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

import pytest
from typer.testing import CliRunner

from mpillm.errors import UsageError
from mpillm.system.command_line import Argument, Debug, Option, command_parameters
from mpillm.verbs import command
from mpillm.verbs.verb_catalog import REFUSED, VERBS

LAST: list[Any] = []


@dataclass(frozen=True)
class Toy:
    """Do nothing, but know every kind of option.

    The second paragraph.
    """

    example: ClassVar = "mpillm toy a --set x=1"

    paths: Annotated[tuple[Path, ...], Argument("Some paths.", metavar="PATH…")] = ()
    overrides: Annotated[tuple[str, ...], Option("Settings.", flag="--set")] = ()
    hosts: Annotated[tuple[str, ...], Option("Hosts.", commas=True)] = ()
    ranks_per_node: Annotated[int, Option("Ranks.", metavar="N", minimum=1, maximum=64)] = 3
    seed: Annotated[int | None, Option("A seed.")] = None
    place: Annotated[bool | None, Option("Where.", flag="--here/--there")] = None
    overwrite: Annotated[bool, Option("Replace.")] = False
    width: int = 80
    debug: Debug = False

    def run(self) -> None:
        LAST.append(self)


def typed(*arguments: str) -> Toy:
    """Give the dataclass that these words of a command line make."""
    command.make_command("toy", Toy).main(args=list(arguments), standalone_mode=False)
    made: Toy = LAST.pop()
    return made


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), Toy()),
        (("a", "b"), Toy(paths=(Path("a"), Path("b")))),
        (("--set", "x=1", "--set", "y=2"), Toy(overrides=("x=1", "y=2"))),
        (("--hosts", "a,b,"), Toy(hosts=("a", "b"))),
        (("--ranks-per-node", "5", "--seed", "7"), Toy(ranks_per_node=5, seed=7)),
        (("--here",), Toy(place=True)),
        (("--there", "--overwrite", "--debug"), Toy(place=False, overwrite=True, debug=True)),
    ],
)
def test_what_is_typed_becomes_the_dataclass(arguments: tuple[str, ...], options: Toy) -> None:
    assert typed(*arguments) == options


@pytest.mark.parametrize("given", ["0", "65", "99999999999999999999999"])
def test_a_number_out_of_its_range_is_named_with_the_range(given: str) -> None:
    with pytest.raises(UsageError, match=f"--ranks-per-node takes 1 to 64, and not {given}"):
        typed("--ranks-per-node", given)
    made = command.make_command("toy", Toy)
    assert "Ranks (1 to 64)." in [getattr(one, "help", "") for one in made.params]


def _paths_of_verbs() -> list[tuple[str, str]]:
    """Give (verb, field) of each path that can be typed."""
    found = []
    for name, target in VERBS.items():
        module, _, attribute = target.partition(":")
        verb = getattr(importlib.import_module(module), attribute)
        kinds = ((one.name, (one.kind, *get_args(one.kind))) for one in command_parameters(verb))
        found += [(name, field) for field, kind in kinds if Path in kind]
    return found


@pytest.mark.parametrize(("verb", "field"), _paths_of_verbs())
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("a\0b", "a NUL byte"),
        ("x" * 5000, "is too long"),
        ("é" * 128, "too long"),
    ],
)
def test_a_path_that_cannot_be_is_refused_by_its_name(
    verb: str, field: str, text: str, words: str
) -> None:
    module, _, attribute = VERBS[verb].partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    parameters = {one.name: one for one in command_parameters(kind)}
    own, typed = parameters[field], []
    for one in parameters.values():
        if one.required or one is own:
            value = text if one is own else "1"
            typed += [one.flag, value] if isinstance(one.marker, Option) else [value]
    with pytest.raises(UsageError, match=f"{re.escape(own.title)}.* {words}") as refused:
        command.make_command(verb, kind).main(args=typed, standalone_mode=False)
    assert len(str(refused.value)) < 400


def test_the_help_is_the_dataclass() -> None:
    made = command.make_command("toy", Toy)
    assert made.help.startswith("Do nothing, but know every kind of option.")
    assert made.epilog == "Example: mpillm toy a --set x=1"
    spelled = [option for one in made.params for option in (*one.opts, *one.secondary_opts)]
    assert "--ranks-per-node" in spelled
    assert "--width" not in spelled, "a field without a marker is no option"
    assert "--no-overwrite" not in spelled


@pytest.mark.parametrize("name", list(VERBS))
def test_every_verb_of_the_catalogue(name: str) -> None:
    module, _, attribute = VERBS[name].partition(":")
    # `import` is a word of Python itself.
    assert module == f"mpillm.verbs.{name.replace('-', '_')}{'_' * keyword.iskeyword(name)}"
    verb = getattr(importlib.import_module(module), attribute)
    assert command.verb_summary(VERBS[name]) == " ".join(verb.__doc__.split("\n\n")[0].split())
    assert verb.example.partition("mpillm ")[2].startswith(f"{name} ")
    parameters = list(command_parameters(verb))
    assert len({one.name for one in parameters}) == len(parameters) <= len(fields(verb))
    assert all(one.marker.help for one in parameters)
    assert parameters[-1].name == "debug" or name == "submit"
    assert command.make_command(name, verb).name == name


@pytest.mark.parametrize(("verb", "old"), list(REFUSED))
@pytest.mark.parametrize("form", ["{} 4", "{}=4"])
def test_an_old_spelling_is_refused_with_the_new_one(verb: str, old: str, form: str) -> None:
    module, _, attribute = VERBS[verb].partition(":")
    made = command.make_command(verb, getattr(importlib.import_module(module), attribute))
    spelled = [option for one in made.params for option in one.opts]
    assert old not in spelled
    assert REFUSED[verb, old] in spelled
    with pytest.raises(UsageError, match=f"{old} is called {REFUSED[verb, old]} now"):
        made.main(args=["x", *form.format(old).split()], standalone_mode=False)


def test_a_verb_of_a_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a verb that a file of a user's defines, without a change of mpillm."""
    from mpillm.cli import app

    (tmp_path / "users_verb.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import Annotated\n"
        "from mpillm.system.command_line import Option\n"
        "@dataclass(frozen=True)\n"
        "class Greet:\n"
        "    '''Greet.'''\n"
        "    name: Annotated[str, Option('Whom.')] = 'world'\n"
        "    def run(self) -> None:\n"
        "        print('hello', self.name)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    done = CliRunner().invoke(app, ["users_verb:Greet", "--name", "rank"])
    assert (done.exit_code, done.output) == (0, "hello rank\n")
    assert "Whom." in CliRunner().invoke(app, ["users_verb:Greet", "--help"]).output


def test_mistakes_are_printed_by_the_first_rank_alone(mpillm) -> None:  # type: ignore[no-untyped-def]
    done = mpillm("bench", "allreduc", ranks=2)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("did you mean allreduce") == 1
    assert "Traceback" not in done.stderr
    old = mpillm("schedule", "1f1b", "--stages", "4")
    assert old.returncode == 2
    assert old.stderr == "mpillm: error: schedule --stages is called --ranks now\n"
    assert "Traceback" in mpillm("bench", "allreduc", "--debug").stderr


def test_an_unknown_verb_is_refused(mpillm) -> None:  # type: ignore[no-untyped-def]
    done = mpillm("trian")
    assert done.returncode == 2
    assert "No such command 'trian'" in done.stderr


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], ("torch", "mpi4py.MPI", "h5py", "numpy", "mpillm.comm", "mpillm.verbs.train")),
        (["train", "--help"], ("torch", "mpi4py.MPI", "h5py", "numpy")),
        (["schedule", "1f1b", "--ranks", "2", "--microbatches", "4"], ("torch", "mpi4py.MPI")),
    ],
)
def test_a_login_node_stays_light(arguments: list[str], absent: tuple[str, ...]) -> None:
    code = (
        f"import sys\nsys.argv = ['mpillm', *{arguments!r}]\nfrom mpillm.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print('loaded:', [name for name in {absent!r} if name in sys.modules])\n"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert "loaded: []" in done.stdout
    assert time.perf_counter() - started < 30, "a hang, not a speed"


def test_a_failure_of_one_rank_alone_is_printed() -> None:
    """Such as a plug-in that another host lacks; mistakes in typing are printed by rank 0."""
    code = "from mpillm import cli\ncli.OTHERS_WAIT_SECONDS = 0\ncli.main()\n"

    def stderr_of(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode
        return done.stderr

    assert "absent_package" in stderr_of("absent_package.verbs:Verb")
    assert stderr_of("bench", "--no-such-option") == ""
