"""Site files, recipes and options of any text: a clear refusal, or a script that does no harm."""

import itertools
import json
import os
import shutil
import subprocess
import sysconfig
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpillm.errors import MpillmError
from mpillm.launch.site import load_site
from mpillm.runs.submit import SubmitOptions, SubmittedRecipe, submit_run
from mpillm.system.console import Console
from mpillm.train.recipe import load_recipe, write_recipe

# Enough for every piece in every place; the seed is fixed.
CASES = 150
RECIPE = '[model]\nlayers = 1\nwidth = 32\nheads = 2\n[data]\npath = "prepared"\n'
PIECES = [
    "$(touch CANARY)",
    "`touch CANARY`",
    "; touch CANARY;",
    "' ; touch CANARY; '",
    '"; touch CANARY; "',
    "\\",
    "\\'",
    "'",
    '"',
    "$",
    "${HOME}",
    "$HOME",
    "*",
    "?",
    "~",
    " ",
    "  ",
    "-",
    "--",
    "-rf",
    "#",
    "!",
    "&",
    "&& touch CANARY",
    "|",
    "<",
    ">CANARY",
    "{a,b}",
    "[x]",
    "=",
    ",",
    ":",
    "%j",
    "ü",
    "日本",
    "“",
    "’",
    "\u00a0",
    "\u2028",
    "\ufeff",
    "a",
    "b",
    "7",
    ".",
    "{{ 7 }}",
    "{% x %}",
    "$((1))",
    "@",
    "^",
    "+",
    "(",
    ")",
    "\U0001d11e",
]
BROKEN = ["\n", "\n#SBATCH --uid=0\n", "\r", "\t", "\x1b[2J", "\x00", "\x85", "\ud800"]
DIRECTIVES = ["--exclusive", "--mem=0", "--comment='$(touch CANARY)'"]
NAMES = ["A_B", "MY", "C"] * 6 + ["UID", "1A", "a-b", "é"]
LONGEST_NAME = 200

nasty = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
broken = st.one_of(st.lists(st.sampled_from(PIECES + BROKEN), min_size=1).map("".join), st.text())
any_text = st.integers(0, 11).flatmap(lambda chance: nasty if chance else broken)


def bare(fit: Sequence[str]) -> st.SearchStrategy[str]:
    """Draw a value that a script does not quote: mostly a fit one, or all would be refused."""
    return st.integers(0, 8).flatmap(lambda chance: st.sampled_from(fit) if chance else any_text)


words = bare(["batch", "gpu_4", "a-b.c", "dc-gpu,dc-cpu"])


def sometimes(strategy: st.SearchStrategy[Any], default: Any) -> st.SearchStrategy[Any]:
    return st.one_of(st.just(default), st.just(default), strategy)


site_tables = st.fixed_dictionaries(
    {},
    optional={
        "partition": words,
        "account": words,
        "constraint": words,
        "directives": st.lists(bare(DIRECTIVES), max_size=2),
        "cores_per_node": st.sampled_from([0, *[64] * 20, -1]),
        "modules": st.lists(bare(["GCC/13.2", "Stages/2025"]), max_size=2),
        "program": st.lists(any_text, min_size=1, max_size=3),
        "variables": st.dictionaries(st.sampled_from(NAMES), any_text, max_size=2),
        "launcher_arguments": st.lists(any_text, max_size=2),
        "node_local": any_text.map(lambda text: f"$PLACE/{text}"),
        "hdf5_file_locking": st.booleans(),
        "profile": any_text.map(lambda text: f"/{text}"),
        "stop_seconds": st.sampled_from([0, *[30] * 20, 99999]),
    },
)


@dataclass(frozen=True)
class Case:
    """A script, and what has to come of it."""

    folder: Path
    run: Path
    script: str
    environment: dict[str, str]
    launch: tuple[str, ...]
    """The last words of the call that starts the ranks, the launcher's own arguments apart."""
    variables: dict[str, str]


def as_toml(table: dict[str, Any]) -> str:
    """Write the table as TOML; text without a form in TOML is refused when it is read."""
    lines = []
    for key, value in table.items():
        if isinstance(value, dict):
            pairs = ", ".join(
                f"{json.dumps(name, ensure_ascii=False)} = {_toml(item)}"
                for name, item in value.items()
            )
            lines.append(f"{key} = {{{pairs}}}")
        else:
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class Asked:
    site: dict[str, Any]
    garbage: str
    folder: str
    run: str
    data: str
    name: str
    stage: bool
    partition: str


asked = st.builds(
    Asked,
    site=site_tables,
    garbage=sometimes(
        st.sampled_from(["", "", "", "acount = 1\n", "[[", 'x = "\\q"\n', "\x00"]), ""
    ),
    folder=nasty,
    run=any_text,
    data=any_text,
    name=sometimes(words, ""),
    stage=st.booleans(),
    partition=sometimes(words, ""),
)


def is_a_path(text: str) -> bool:
    """Return whether a folder of this name can be made here."""
    try:
        path = os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return b"\x00" not in path and all(len(part) <= LONGEST_NAME for part in path.split(b"/"))


def make_case(asked: Asked, root: Path, number: int) -> Case:
    """Ask `mpillm submit --dry-run` in this process. Raises MpillmError."""
    name = "".join(asked.folder.split("/"))[:60].replace("\x00", "")
    # The name ".." would be the folder above.
    folder = root / str(number) / f"f{name}"
    folder.mkdir(parents=True)
    os.chdir(folder)
    write(root / str(number) / "site.toml", as_toml(asked.site) + asked.garbage)
    write(folder / "r.toml", RECIPE)
    site = load_site(root / str(number) / "site.toml", {})
    recipe = load_recipe(
        folder / "r.toml", [f"train.run=runs/{asked.run}", f"data.path=data/{asked.data}"]
    )
    text = write_recipe(recipe)
    said = StringIO()
    options = SubmitOptions(
        nodes=2,
        ranks_per_node=3,
        time="10m",
        scheduler="slurm",
        name=asked.name,
        dry_run=True,
        as_json=True,
        stage=asked.stage and bool(site.node_local),
        partition=asked.partition,
    )
    submit_run(
        options,
        SubmittedRecipe("r", recipe.train.run, recipe.data.path, "", text),
        site,
        Console(stream=said),
        {},
    )
    told = json.loads(said.getvalue())
    run = os.path.abspath(folder / recipe.train.run)  # noqa: PTH100
    profile = ("--set", f"parallel.profile={site.profile}") if site.profile else ()
    program = (
        tuple(told["command"][: told["command"].index("train")])
        if not site.program
        else site.program
    )
    assert tomllib.loads(text)["train"]["run"] == f"runs/{asked.run}"
    return Case(
        folder,
        Path(run),
        told["script"],
        {"PLACE": str(root / str(number))},
        (*site.launcher_arguments, *program, "train", f"{run}/job.toml", "--resume", *profile),
        site.variables,
    )


def shellcheck(paths: Sequence[Path]) -> str:
    """Return shellcheck's output, without its analysis of data flow (test_batch_script.py)."""
    program = shutil.which(
        "shellcheck", path=f"{sysconfig.get_path('scripts')}:/usr/bin:/usr/local/bin"
    )
    if program is None or not paths:
        return ""
    return subprocess.run(
        [program, "--extended-analysis=false", *paths], text=True, capture_output=True, check=False
    ).stdout


SRUN = """#!/bin/bash
case $* in
*"--mpi=none"*)
    printf '%s\\0' "$@" >>"$RECORD/each_node"
    exit 1
    ;;
esac
printf '%s\\0' "$@" >"$RECORD/launch"
env -0 >"$RECORD/environment"
echo finished >"$OUTCOME/outcome"
"""


def run_case(case: Case, number: int, stubs: Path) -> str:
    """Run the script with an srun that records its call; return the fault, "" without one."""
    record = stubs.parent / f"record-{number}"
    record.mkdir()
    script = record / "job.sh"
    script.write_text(case.script)
    try:
        case.run.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""  # a name too long for this file system
    environment = {
        "PATH": f"{stubs}:/usr/bin:/bin",
        "HOME": str(record),
        "RECORD": str(record),
        "OUTCOME": str(case.run),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_END_TIME": str(int(time.time()) + 600),
        "LC_ALL": "C.UTF-8",
        **case.environment,
    }
    done = subprocess.run(
        ["bash", script],
        env=environment,
        cwd=record,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    if done.returncode:
        return f"exit code {done.returncode}: {done.stdout}{done.stderr}"
    launch = (record / "launch").read_text(errors="surrogateescape").split("\0")[:-1]
    own = [word for word in launch[: len(launch) - len(case.launch)] if word.startswith("--")]
    if tuple(launch[len(own) :]) != case.launch:
        return f"the ranks were started as {launch} and not {case.launch}"
    pairs = (record / "environment").read_text(errors="surrogateescape").split("\0")[:-1]
    found = dict(pair.split("=", 1) for pair in pairs)
    wrong = {
        name: found.get(name) for name, value in case.variables.items() if found.get(name) != value
    }
    return f"the environment has {wrong} and not {case.variables}" if wrong else ""


def check_all(cases: Sequence[Case], stubs: Path) -> list[str]:
    with ThreadPoolExecutor(2) as pool:
        faults = list(pool.map(lambda item: run_case(item[1], item[0], stubs), enumerate(cases)))
        scripts = [stubs.parent / f"record-{number}" / "job.sh" for number in range(len(cases))]
        parsed = pool.map(
            lambda path: subprocess.run(["bash", "-n", path], check=False).returncode, scripts
        )
        faults += [
            f"bash -n fails on {path}" for path, code in zip(scripts, parsed, strict=True) if code
        ]
        faults += pool.map(shellcheck, [scripts[start::16] for start in range(16)])
    return [fault for fault in faults if fault]


@pytest.mark.usefixtures("processes")
def test_any_text_is_refused_or_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cases: dict[str, Case] = {}
    refusals: list[str] = []
    made: list[str] = []
    numbers = itertools.count()

    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(asked)
    def ask(asked_for: Asked) -> None:
        try:
            case = make_case(asked_for, tmp_path / "cases", next(numbers))
        except MpillmError as refusal:
            refusals.append(str(refusal))
        else:
            made.append(case.script)
            if is_a_path(str(case.run)):
                cases.setdefault(case.script, case)

    ask()
    assert len(refusals) + len(made) >= CASES
    assert [text for text in refusals if "\n" in text or len(text) < 20] == []
    assert len(cases) > CASES // 5, "most refused: the texts are too nasty to test anything"
    stubs = tmp_path / "stubs" / "bin"
    stubs.mkdir(parents=True)
    for name, text in (
        ("srun", SRUN),
        ("module", "#!/bin/sh\n"),
        ("scontrol", "#!/bin/sh\nexit 1\n"),
    ):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    assert check_all(list(cases.values()), stubs) == []
    assert [path for path in tmp_path.rglob("*") if path.name == "CANARY"] == []
