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
        file = _file_of(name)
        # Installed somewhere, but not where the file is.
        if file and _is_installed(name) and not _is_installed(name, file):
            found[name] = file
    own = [Path(sysconfig.get_path(which)).resolve() for which in ("stdlib", "platstdlib")]
    # Loaded ones alone: looking up all of them takes long.
    for name in sorted(sys.stdlib_module_names & set(sys.modules)):
        file = _file_of(name)
        if file and not any(file.is_relative_to(folder) for folder in own):
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
    return Path(place).resolve() if place else None


def _is_installed(name: str, file: Path | None = None) -> bool:
    """Return whether a folder of sys.path has the package's metadata, or that of `file` alone."""
    if file is None:
        return any(metadata.distributions(name=name))
    # numpy/__init__.py is in a folder of the package, xxhash.py next to the metadata.
    folders = [str(folder) for folder in (file.parent, file.parent.parent)]
    return any(metadata.distributions(name=name, path=folders))
