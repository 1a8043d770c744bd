"""The house keeps its form: floors, circles, sizes, and a table of contents that is true.

The rules are functions over a folder of Python files, so that each is also shown to fail on a
planted fault.
"""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "mpillm"

# The floors, lowest first. A room imports only from the floors below its own, never sideways.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("system",),
    ("machine",),
    ("comm", "models", "launch"),
    ("tasks",),
    ("tokens", "parallel"),
    ("torch", "weights"),
    ("runs", "plan"),
    ("infer",),
    ("train", "bench", "doctor"),
    ("verbs",),
    ("cli",),
    ("__main__",),
)
# Rooms that read the environment: the process itself, how a job starts, and the command line.
READ_ENVIRONMENT = {"system", "launch", "verbs", "cli"}
TEXTS = {".py", ".sh", ".md", ".toml", ".txt", ".build", ".c", ".h", ".yaml", ".job"}
SOURCES = (".py", ".pyi", ".c", ".h", ".j2", ".json")
IGNORED = {
    ".git",
    ".venv",
    ".venv-mpich",
    ".venv-openmpi",
    ".venv-system",
    "build",
    "dist",
    "prepared",
    "runs",
}
UNFINISHED = r"\b(?:TODO|FIXME|XXX)\b|(?<![\w.}>)*-])/(?:root|home|Users|work)/\w+"
MEDIAN_FILE, LARGEST_FILE = (120, 250), 600
LARGEST_P95, LARGEST_BODY, MOST_PARAMETERS = 40, 80, 10
MOST_FILES, LARGEST_CLI = 24, 100
# Folders in which one thing is one file: its length is the thing's own, so the median leaves them
# out.
ONE_OF_A_KIND = (
    "comm/algorithms/",
    "doctor/checks/",
    "launch/schedulers/",
    "models/layers/",
    "parallel/pipeline/schedules/",
    "runs/sinks/",
    "tasks/",
    "train/optimizers/",
    "verbs/",
)
# An interface in such a folder is as long as any other file.
INTERFACES = {"launch/schedulers/batch_system.py"}


def modules(house: Path) -> dict[str, ast.Module]:
    """Map dotted names in the house to syntax trees: `comm.mesh`; a package by its own name."""
    found = {}
    for path in sorted(house.rglob("*.py")):
        parts = path.relative_to(house).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = ast.parse(
            path.read_text(encoding="utf-8")
        )
    return found


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield every `mpillm.…` name that a module imports, without the package's own name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this house"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("mpillm.") for name in names if name.startswith("mpillm."))


def room_of(module: str) -> str:
    return module.partition(".")[0]


def floor_of(room: str) -> int | None:
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), None)


def floor_faults(house: Path) -> list[str]:
    faults = []
    for module, tree in modules(house).items():
        room = room_of(module)
        floor = floor_of(room)
        if floor is None and room:
            faults.append(
                f"{module}: no floor is set for the room {room}; "
                "set one in test_house.py and the README"
            )
        if floor is None:
            continue
        below = {room for rooms in FLOORS[:floor] for room in rooms}
        faults += [
            f"{module} imports {name}: {room} may only import from the floors below it"
            for name in imports(tree)
            if room_of(name) not in below | {room}
        ]
    return faults


def homonym_faults(house: Path) -> list[str]:
    """Classes and modules that share a name, a leading underscore apart.

    A verb bears the name of what it runs, a package that of its room, so neither counts.
    """
    found: dict[str, list[str]] = {}
    for module, tree in modules(house).items():
        name = module.rpartition(".")[2]
        if room_of(module) != "verbs" and not (house / module.replace(".", "/")).is_dir():
            found.setdefault(f"module {name}", []).append(module)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(f"class {node.name.lstrip('_')}", []).append(module)
    return [
        f"{name} is in {' and '.join(places)}" for name, places in found.items() if len(places) > 1
    ]


def at_import(tree: ast.Module) -> ast.Module:
    """Return what runs when the module is imported: no body of a function, no import for types."""

    class Pruned(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            return ast.Pass()

        def visit_If(self, node: ast.If) -> ast.AST:
            return (
                ast.Pass()
                if ast.unparse(node.test) == "TYPE_CHECKING"
                else self.generic_visit(node)
            )

    return Pruned().visit(ast.parse(ast.unparse(tree)))


def circles(house: Path) -> list[str]:
    """List chains of modules that import the next when imported and end where they begin."""
    trees = {module: at_import(tree) for module, tree in modules(house).items()}

    def target(name: str) -> str:
        return name if name in trees else name.rpartition(".")[0]

    graph = {
        module: {target(name) for name in imports(tree)} - {module}
        for module, tree in trees.items()
    }
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, chain: list[str]) -> None:
        if module in chain:
            found.append(" → ".join([*chain[chain.index(module) :], module]))
            return
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, [*chain, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def body_lengths(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Count the lines of each function's body without its docstring.

    A nested function counts with its parent and by itself.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            yield node.name, (body[-1].end_lineno or 0) - body[0].lineno + 1


def parameter_counts(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield each function's number of parameters, `self` apart."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [
                a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            ]
            yield node.name, len([name for name in names if name not in ("self", "cls")])


def size_faults(house: Path) -> list[str]:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in house.rglob("*.py")
    }
    faults = [
        f"{path.name} has {n} lines, at most {LARGEST_FILE}: split it"
        for path, n in lengths.items()
        if n > LARGEST_FILE
    ]
    trees = modules(house)
    bodies = [
        (f"{module}.{name}", n) for module, tree in trees.items() for name, n in body_lengths(tree)
    ]
    faults += [
        f"{name} has a body of {n} lines, at most {LARGEST_BODY}"
        for name, n in bodies
        if n > LARGEST_BODY
    ]
    p95 = sorted(n for _, n in bodies or [("", 0)])[int(0.95 * len(bodies))]
    faults += [f"95% of the bodies should be within {LARGEST_P95} lines: {p95}"] * (
        p95 > LARGEST_P95
    )
    faults += [
        f"{module}.{name} has {n} parameters, at most {MOST_PARAMETERS}: "
        "gather some in a settings object"
        for module, tree in trees.items()
        for name, n in parameter_counts(tree)
        if n > MOST_PARAMETERS
    ]
    folders = [
        path for path in (house, *house.rglob("*")) if path.is_dir() and path.name != "__pycache__"
    ]
    counts = {
        folder: len([f for f in folder.iterdir() if f.suffix in SOURCES]) for folder in folders
    }
    return faults + [
        f"{folder.name}/ holds {n} files, at most {MOST_FILES}: make rooms in it"
        for folder, n in counts.items()
        if n > MOST_FILES
    ]


def is_one_of_a_kind(path: Path, house: Path) -> bool:
    """Check whether a file may be short: one thing of its kind (a verb, a check), a catalogue."""
    within = path.relative_to(house).as_posix()
    if path.stem.endswith("_catalog"):
        return True
    return within.startswith(ONE_OF_A_KIND) and within not in INTERFACES


def median_length(house: Path) -> float:
    """Return the median length of the files that could be longer or shorter."""
    files = [
        path
        for path in house.rglob("*.py")
        if path.name != "__init__.py" and not is_one_of_a_kind(path, house)
    ]
    return statistics.median(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def listed(house: Path) -> set[str]:
    """Return the files in the dictionary of meson.build, and the sources of the compiled module."""
    text, found = (house / "meson.build").read_text(), set()
    rooms, _, compiled = text.partition("sources = [")
    room = ""
    for key, file in re.findall(r"'([\w/]*)': \[|'([\w.]+\.(?:pyi?|c|h|j2|json))'", rooms):
        if file:
            found.add(f"{room}/{file}" if room else file)
        else:
            room = key
    sources = re.findall(r"'([\w.]+\.[ch])'", compiled.partition("]")[0])
    return found | {f"comm/csrc/{file}" for file in sources}


def existing(house: Path) -> set[str]:
    return {str(path.relative_to(house)) for path in house.rglob("*") if path.suffix in SOURCES}


def word_faults(house: Path) -> list[str]:
    faults = []
    for path in house.rglob("*.py"):
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(house))
        if re.search(r"^\s*(import|from) pickle\b", text, re.MULTILINE):
            faults.append(f"{name} imports pickle; mpillm stores nothing by pickle")
        if (
            re.search(r"\bos\.(environ|getenv)\b|\bfrom os import .*\b(environ|getenv)", text)
            and room_of(name.replace("/", ".").removesuffix(".py")) not in READ_ENVIRONMENT
        ):
            faults.append(
                f"{name} reads the environment; only {', '.join(sorted(READ_ENVIRONMENT))} do"
            )
        if any(isinstance(node, ast.Global) for node in ast.walk(ast.parse(text))):
            faults.append(f"{name} has a global statement; hand the value on as an argument")
        # The package's own __init__ exports the names of docs/api.md (tests/test_docs.py).
        is_room = path.name == "__init__.py" and path.parent != house
        if is_room and not _only_a_docstring(text):
            faults.append(f"{name} holds more than a docstring")
    return faults


def unfinished_faults(root: Path) -> list[str]:
    """List notes of unfinished work and folders of one machine alone in the repository."""
    seen = [path for path in root.rglob("*") if path.suffix in TEXTS and path != Path(__file__)]
    seen = [path for path in seen if not IGNORED.intersection(path.relative_to(root).parts)]
    return [
        f"{path.relative_to(root)}:{number} holds {found.group()}: "
        "do it or drop it; name no machine's own folder"
        for path in sorted([*seen, *root.glob(".ci/*")])
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for found in re.finditer(UNFINISHED, line)
    ]


def _only_a_docstring(text: str) -> bool:
    tree = ast.parse(text)
    return len(tree.body) == 1 and ast.get_docstring(tree) is not None


def plant(house: Path, **files: str) -> Path:
    """A small house: `plant(path, comm__mesh="import …")` writes comm/mesh.py."""
    for name, text in files.items():
        path = house / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return house


def test_imports_go_down_the_floors() -> None:
    assert floor_faults(HOUSE) == []


def test_no_circles() -> None:
    assert circles(HOUSE) == []


def test_sizes() -> None:
    assert size_faults(HOUSE) == []
    low, high = MEDIAN_FILE
    assert low <= median_length(HOUSE) <= high
    assert len((HOUSE / "cli.py").read_text(encoding="utf-8").splitlines()) < LARGEST_CLI


def test_one_word_is_one_thing() -> None:
    assert homonym_faults(HOUSE) == []


def test_meson_lists_exactly_the_files_that_exist() -> None:
    assert listed(HOUSE) == existing(HOUSE), "mend the dictionary in mpillm/meson.build"


def test_words_that_have_no_place() -> None:
    assert word_faults(HOUSE) == []


def test_nothing_unfinished_and_no_machine_of_ours() -> None:
    assert unfinished_faults(ROOT) == []


def test_the_readme_shows_every_room() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = {path.name for path in HOUSE.iterdir() if (path / "__init__.py").exists()}
    assert [
        room for room in sorted(rooms) if not re.search(rf"^\s+{room}/\s+\S", readme, re.MULTILINE)
    ] == []


@pytest.mark.usefixtures("processes")
def test_help_loads_neither_mpi_nor_torch() -> None:
    code = (
        "import sys\nsys.argv = ['mpillm', '--help']\nfrom mpillm.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = ('torch', 'mpi4py.MPI', 'h5py', 'numpy')\n"
        "print('loaded:', [name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert "prepare" in done.stdout
    assert "loaded: []" in done.stdout


def test_planted_faults_are_found(tmp_path: Path) -> None:
    upward = plant(
        tmp_path / "up", comm__mesh="from mpillm.models import decoder\n", models__decoder=""
    )
    assert any("comm.mesh imports models.decoder" in fault for fault in floor_faults(upward))
    hidden = plant(
        tmp_path / "hidden", tokens__a="def f():\n    import mpillm.parallel.data.same_weights\n"
    )
    assert any("tokens.a imports parallel.data" in fault for fault in floor_faults(hidden))
    assert any("no floor" in fault for fault in floor_faults(plant(tmp_path / "new", cellar__a="")))
    sideways = plant(tmp_path / "side", comm__a="import mpillm.launch.b\n", launch__b="")
    assert any("comm.a imports launch.b" in fault for fault in floor_faults(sideways))
    twins = plant(
        tmp_path / "twins",
        comm__a="class _Plan:\n    x = 1\n",
        tokens__a="class Plan:\n    x = 1\n",
    )
    assert homonym_faults(twins) == [
        "module a is in comm.a and tokens.a",
        "class Plan is in comm.a and tokens.a",
    ]
    wide = plant(
        tmp_path / "wide", a=f"def f({', '.join(f'x{n}' for n in range(11))}):\n    pass\n"
    )
    assert any("a.f has 11 parameters" in fault for fault in size_faults(wide))
    full = plant(tmp_path / "full", **{f"comm__m{n}": "" for n in range(25)})
    assert any("comm/ holds 25 files" in fault for fault in size_faults(full))
    ring = plant(
        tmp_path / "ring", comm__a="from mpillm.comm.b import x\n", comm__b="import mpillm.comm.a\n"
    )
    assert circles(ring) == ["comm.a → comm.b → comm.a"]
    long = plant(tmp_path / "long", a="def f():\n" + "    x = 1\n" * 81)
    assert any("a.f has a body of 81 lines" in fault for fault in size_faults(long))
    assert any(
        "601 lines" in fault for fault in size_faults(plant(tmp_path / "huge", a="x = 1\n" * 601))
    )


def test_planted_words_are_found(tmp_path: Path) -> None:
    house = plant(
        tmp_path,
        comm__a="import os\nos.environ['X']\n",
        comm__b="from os import getenv\n",
        comm__c="import pickle\n",
        comm__d="def f():\n    global x\n    x = 1\n",
        launch__a="import os\nos.getenv('X')\n",
    )
    (house / "comm/__init__.py").write_text("import os\n")
    faults = " ".join(word_faults(house))
    for word in (
        "comm/a.py reads the environment",
        "comm/b.py reads the environment",
        "comm/c.py imports pickle",
        "comm/d.py has a global",
    ):
        assert word in faults
    assert "more than a docstring" in faults
    assert "launch/a.py" not in faults


def test_every_template_of_a_batch_script_is_installed() -> None:
    there = {path.name for path in (ROOT / "jobs/templates").iterdir()}
    assert set(re.findall(r"'(\w+\.sh)'", (ROOT / "meson.build").read_text())) == there


def test_a_forgotten_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "meson.build").write_text(
        "rooms = {\n  '': ['a.py'],\n  'comm': [\n    'b.py',\n  ],\n}\n"
    )
    plant(tmp_path, a="", comm__b="", comm__c="")
    assert existing(tmp_path) - listed(tmp_path) == {"comm/c.py"}


def test_planted_unfinished_work_is_found(tmp_path: Path) -> None:
    plant(
        tmp_path,
        a="x = 1  # TODO later\n",
        b="path = '/home/someone/data'\n",
        runs__c="# FIXME\n",
        d="'a/home/b'\n",
    )
    (tmp_path / "e.md").write_text("mktemp -d job.XXXXXX, https://example.org/home/page\n")
    faults = unfinished_faults(tmp_path)
    assert [fault.partition(":")[0] for fault in faults] == ["a.py", "b.py"]
    assert "holds /home/someone" in faults[1]
