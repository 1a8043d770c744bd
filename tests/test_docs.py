"""The documents are true: links, paths, verbs, the exported names, the picture and the examples."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import mpillm
from mpillm.comm.algorithms.algorithm_catalog import load_algorithm, schedule
from mpillm.doctor.check_base import Check
from mpillm.launch.schedulers.scheduler_catalog import load_scheduler
from mpillm.models.model_catalog import spec_class
from mpillm.parallel.pipeline.schedule_catalog import make_schedule
from mpillm.runs.metrics import MetricsSink
from mpillm.system.command_line import command_parameters
from mpillm.system.plugins import load_plugin
from mpillm.tasks.answer_rewards.reward_catalog import make_rewards
from mpillm.tasks.metrics.metric import Metric
from mpillm.tasks.task_catalog import TaskSettings, make_task
from mpillm.train.optimizers.optimizer_catalog import optimizer_class
from mpillm.verbs.command import make_command
from mpillm.verbs.verb_catalog import VERBS

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("data/**/*.md"),
        ROOT / "benchmarks/README.md",
    ]
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A path from the repository's root, or a file named within the package: `tasks/task.py`.
PATH = re.compile(
    r"(?<![\w/.-])((?:mpillm|docs|tests|benchmarks|jobs|data)/[\w./-]*|\w+/[\w/]+\.py)\b"
)
VERB = re.compile(r"(?<![\w./\"#(-])mpillm ([a-z]\w*)(?![\w:.=-])")


def code_of(text: str) -> Iterator[str]:
    """Yield the code spans and blocks of a page, without Python and comments."""
    for language, block in FENCED.findall(text):
        if language != "python":
            yield re.sub(r"(?:^| )#.*$", "", block, flags=re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", FENCED.sub("", text))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    faults = []
    for link in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        target, _, heading = link.partition("#")
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path = (page.parent / target) if target else page
        if not path.exists() or (heading and heading not in anchors(path)):
            faults.append(link)
    assert faults == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {path.rstrip("./") for code in code_of(text) for path in PATH.findall(code)}
    faults = [
        path
        for path in sorted(named)
        if "NAME" not in path
        and not any((base / path).exists() for base in (ROOT, ROOT / "mpillm"))
    ]
    assert faults == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_verbs_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {verb for code in code_of(text) for verb in VERB.findall(code)}
    assert sorted(named - set(VERBS)) == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_options_exist(page: Path) -> None:
    faults = []
    for code in code_of(page.read_text(encoding="utf-8")):
        for line in code.replace("\\\n", " ").splitlines():
            _, found, words = ([*VERB.split(line, maxsplit=1), "", ""])[:3]
            if found in VERBS:
                used = re.findall(r"(?<![\w-])--[a-z][\w-]*", re.split(r"[|&;]", words)[0])
                faults += [f"{found} {flag}" for flag in used if flag not in flags_of(found)]
    assert faults == []


def flags_of(verb: str) -> set[str]:
    """Return the options of a verb, `--this/--that` apart."""
    options = command_parameters(load_plugin(VERBS[verb], {}, "verb"))
    return {"--help", *(flag for one in options for flag in one.flag.split("/"))}


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = list(project["project"]["dependencies"])
    for extra in project["project"]["optional-dependencies"].values():
        needed += extra
    needed += project["build-system"]["requires"]
    page = (ROOT / "docs/decisions/dependencies.md").read_text(encoding="utf-8")
    names = {re.split(r"[>=\[;]", text)[0] for text in needed} - {"mpillm"}
    assert (
        sorted(name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", page)) == []
    )


def test_every_benchmark_is_listed() -> None:
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    scripts = [
        path.name for path in (ROOT / "benchmarks").iterdir() if path.suffix in (".py", ".sh")
    ]
    assert sorted(name for name in scripts if f"`{name}`" not in page) == []


def test_every_decision_is_listed_and_dated() -> None:
    folder = ROOT / "docs/decisions"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    for page in sorted(set(folder.glob("*.md")) - {folder / "README.md"}):
        assert f"]({page.name})" in listed, page.name
        lines = page.read_text(encoding="utf-8").splitlines()
        assert re.match(r"20\d\d-\d\d-\d\d", lines[2]), f"{page.name} begins with its date"


def test_the_api_page_lists_what_is_exported() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(mpillm.EXPORTS)
    for name, target in mpillm.EXPORTS.items():
        assert getattr(mpillm, name) is load_plugin(target, {}, "export")
    with pytest.raises(AttributeError, match="exports no 'Decoder'"):
        mpillm.Decoder  # noqa: B018


def test_type_checkers_see_what_is_exported() -> None:
    tree = ast.parse((ROOT / "mpillm/__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.asname: f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert seen == dict(mpillm.EXPORTS)


@pytest.mark.usefixtures("processes")
def test_import_mpillm_loads_neither_torch_nor_mpi() -> None:
    code = (
        "import sys\nimport mpillm\ndir(mpillm)\nheavy = ('torch', 'mpi4py', 'h5py', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_picture_of_a_step_is_what_its_script_draws() -> None:
    script = load_file(ROOT / "docs/make_step_svg.py")
    assert script.FILE.read_text(encoding="utf-8") == script.draw(), "python docs/make_step_svg.py"


def test_the_readme_reads_eight_files() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Read the code in this order")[2].partition("\n## ")[0]
    links = re.findall(r"^\d\. \[([\w/.]+)\]\(([\w/.]+)\)", section, re.MULTILINE)
    assert len(links) == 8
    assert all(name == target and (ROOT / target).is_file() for name, target in links)


def test_the_examples_of_extending_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    for language, block in FENCED.findall(page):
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", block)
            assert name is not None
            (tmp_path / name[1]).write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = spec_class("my_model:TinySpec")(vocab_size=7)
    assert sum(weight.numel() for weight in spec.build().parameters()) == spec.parameters
    assert make_task("my_task:EvenTargets").metrics == ("loss", "my_metric:Accuracy")
    assert issubclass(load_plugin("my_metric:Accuracy", {}, "metric"), Metric)
    rewards = make_rewards(TaskSettings("grpo", rewards=("my_reward:nearness",)))
    assert rewards.each("3+4=", "9", "7") == [1 / 3]
    sink = load_plugin("my_sink:LossTable", {}, "sink")()
    assert isinstance(sink, MetricsSink)
    sink.open(tmp_path, 0)
    sink.add({"step": 1, "loss": 0.5})
    sink.close()
    assert (tmp_path / "loss.csv").read_text() == "1,0.5\n"
    weights = dict(spec.build().named_weights())
    optimizer = optimizer_class("my_optimizer:MomentumSettings")().build(weights)
    for weight in weights.values():
        weight.grad = weight.detach().clone()
    optimizer.step()
    for ranks in (1, 2, 4):
        make_schedule("my_schedule:PAIRED", ranks, 8)
    assert "allreduce" in load_algorithm("my_algorithm:TO_NEXT").rounds
    sent = [
        len(list(filter(None, schedule("allreduce", "my_algorithm:TO_NEXT", rank, 3).rounds)))
        for rank in range(3)
    ]
    assert sent == [2, 4, 2]
    assert make_command("my_verb:Count", load_plugin("my_verb:Count", VERBS, "verb"))
    system = load_scheduler("my_scheduler:CENTRE")
    assert re.search(system.answer, "job 7\n", re.MULTILINE)
    check = load_plugin("my_check:ScratchCheck", {}, "check")()
    assert isinstance(check, Check)
    assert len(list(check.examine_host(None))) == 1


def load_file(path: Path) -> ModuleType:
    """Import one Python file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
