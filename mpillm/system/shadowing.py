"""Files that hide an installed package: a torch.py or numpy.py of a user's in a folder of sys.path.

An empty entry of PYTHONPATH, as `:` makes one, is the current folder.
"""

import sys
import sysconfig
from collections.abc import Iterable, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

PACKAGES = (
    "numpy",
    "torch",
    "h5py",
    "tokenizers",
    "mpi4py",
    "typer",
    "click",
    "rich",
    "pydantic",
    "xxhash",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "tensorboard",
)


def hidden_packages(names: Iterable[str] = PACKAGES) -> dict[str, Path]:
    """Map each of `names`, and each loaded module of Python's own, to the file that hides it."""
    found = {}
    for name in names:
        file, home = _file_of(name), _installed_in(name)
        # An environment may be made of links into another one.
        if file and home and not _is_inside(file, home):
            found[name] = file
    own = [Path(sysconfig.get_path(which)) for which in ("stdlib", "platstdlib")]
    # Loaded ones alone: looking up all of them takes long.
    for name in sorted(sys.stdlib_module_names & set(sys.modules)):
        file = _file_of(name)
        if file and not any(_is_inside(file, folder) for folder in own):
            found[name] = file
    return found


def explain_hidden(found: Mapping[str, Path]) -> tuple[str, str]:
    """Say which files hide which packages, and what helps; "" and "" where none does."""
    if not found:
        return "", ""
    files = list(dict.fromkeys(map(str, found.values())))
    names = " and ".join(found)
    text = f"{' and '.join(files)} {'hides' if len(files) == 1 else 'hide'} the installed {names}"
    return text, f"rename {'it' if len(files) == 1 else 'them'}, or unset PYTHONPATH"


def _file_of(name: str) -> Path | None:
    try:
        spec = find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None
    place = spec.origin if spec is not None and spec.has_location else None
    return Path(place) if place else None


def _is_inside(file: Path, folder: Path) -> bool:
    return file.is_relative_to(folder) or file.resolve().is_relative_to(folder.resolve())


def _installed_in(name: str) -> Path | None:
    """Return the folder that the package's own metadata is in."""
    try:
        return Path(str(metadata.distribution(name).locate_file("")))
    except metadata.PackageNotFoundError:
        return None
