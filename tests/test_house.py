"""The house keeps its form: floors, circles, sizes, and a table of contents that is true.

The rules are functions over a folder of Python files, so that each is also shown to fail on a planted fault.
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

GROUND = {"files", "hdf5", "console", "pages", "lone", "pmix"}
BELOW: dict[str, set[str]] = {
    "errors": set(),
    **{room: {"errors"} | GROUND for room in GROUND},
    **{room: {"errors"} | GROUND for room in ("comm", "models", "launch")},
    "parallel": {"comm", "models"},
    "tokens": {"comm"},
    **{room: {"comm", "models", "parallel"} for room in ("weights", "plan", "bench")},
    "infer": {"comm", "models", "tokens", "parallel", "weights"},
    "train": {"comm", "models", "launch", "parallel", "tokens", "weights", "infer"},
}
TEXTS = {".py", ".sh", ".md", ".toml", ".txt", ".build", ".c", ".h", ".yaml", ".job"}
SOURCES = (".py", ".pyi", ".c", ".h", ".j2")
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
LARGEST_MEDIAN, LARGEST_FILE = 200, 600
LARGEST_P95, LARGEST_BODY = 40, 80


def modules(house: Path) -> dict[str, ast.Module]:
    """Dotted name within the house → syntax tree: `comm.mesh`, `errors`; a package bears its own name."""
    found = {}
    for path in sorted(house.rglob("*.py")):
        parts = path.relative_to(house).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = ast.parse(
            path.read_text(encoding="utf-8")
        )
    return found


def imports(tree: ast.Module) -> Iterator[str]:
    """Every `mpillm.…` name that a module imports, wherever it stands, without the package's own name."""
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


def floor_faults(house: Path) -> list[str]:
    faults = []
    for module, tree in modules(house).items():
        room = room_of(module)
        if room in ("cli", "__main__", ""):
            continue
        if room not in BELOW:
            faults.append(
                f"{module}: no floor is set for the room {room}; set one in test_house.py and the README"
            )
            continue
        allowed = BELOW[room] | {room} | ({"errors"} | GROUND if room != "errors" else set())
        faults += [
            f"{module} imports {name}: {room} may only import {', '.join(sorted(allowed))}"
            for name in imports(tree)
            if room_of(name) not in allowed
        ]
    return faults


def circles(house: Path) -> list[str]:
    """Chains of modules that end where they begin."""
    trees = modules(house)

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
    """Lines of each function's body, its docstring apart; a nested function counts with its parent and by itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            yield node.name, (body[-1].end_lineno or 0) - body[0].lineno + 1


def size_faults(house: Path) -> list[str]:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in house.rglob("*.py")
    }
    faults = [
        f"{path.name} has {n} lines, at most {LARGEST_FILE}: split it"
        for path, n in lengths.items()
        if n > LARGEST_FILE
    ]
    full = [n for path, n in lengths.items() if path.name != "__init__.py"]
    if statistics.median(full) > LARGEST_MEDIAN:
        faults.append(
            f"the median file has {statistics.median(full)} lines, at most {LARGEST_MEDIAN}: split some"
        )
    bodies = [
        (f"{module}.{name}", n)
        for module, tree in modules(house).items()
        for name, n in body_lengths(tree)
    ]
    faults += [
        f"{name} has a body of {n} lines, at most {LARGEST_BODY}"
        for name, n in bodies
        if n > LARGEST_BODY
    ]
    p95 = sorted(n for _, n in bodies or [("", 0)])[int(0.95 * len(bodies))]
    return faults + (
        [f"95% of the bodies should be within {LARGEST_P95} lines: {p95}"]
        if p95 > LARGEST_P95
        else []
    )


def listed(house: Path) -> set[str]:
    """The files in the dictionary of meson.build."""
    found, room = set(), ""
    for key, file in re.findall(
        r"^  '([\w/]*)': \[|'([\w.]+\.(?:pyi?|c|h|j2))'",
        (house / "meson.build").read_text(),
        re.MULTILINE,
    ):
        if file:
            found.add(f"{room}/{file}" if room else file)
        else:
            room = key
    return found


def existing(house: Path) -> set[str]:
    return {str(path.relative_to(house)) for path in house.rglob("*") if path.suffix in SOURCES}


def word_faults(house: Path) -> list[str]:
    faults = []
    for path in house.rglob("*.py"):
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(house))
        if re.search(r"^\s*(import|from) pickle\b", text, re.MULTILINE):
            faults.append(f"{name} imports pickle; mpillm stores nothing by pickle")
        if re.search(
            r"\bos\.(environ|getenv)\b|\bfrom os import .*\b(environ|getenv)", text
        ) and room_of(name.replace("/", ".")) not in ("launch", "cli"):
            faults.append(f"{name} reads the environment; only launch and cli do")
        if any(isinstance(node, ast.Global) for node in ast.walk(ast.parse(text))):
            faults.append(f"{name} has a global statement; hand the value on as an argument")
        if path.name == "__init__.py" and not _only_a_docstring(text):
            faults.append(f"{name} holds more than a docstring")
    return faults


def unfinished_faults(root: Path) -> list[str]:
    """What no file of the repository should hold: a note of unfinished work, a folder of one machine alone."""
    seen = [path for path in root.rglob("*") if path.suffix in TEXTS and path != Path(__file__)]
    seen = [path for path in seen if not IGNORED.intersection(path.relative_to(root).parts)]
    return [
        f"{path.relative_to(root)}:{number} holds {found.group()}: do it or drop it; name no machine's own folder"
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


@pytest.mark.alone
def test_help_loads_neither_mpi_nor_torch() -> None:
    code = (
        "import sys\nsys.argv = ['mpillm', '--help']\nfrom mpillm.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print('loaded:', [name for name in ('torch', 'mpi4py.MPI', 'h5py', 'numpy') if name in sys.modules])\n"
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
