"""Load the compiled kernel: sums, team collectives and SPSC queues in shared memory (csrc/).

An installed package holds the compiled module next to this file. A checkout holds the C sources
instead, and its Python files run with the compiled module of the installed package. Nothing is
rebuilt at import. kernel.pyi documents the functions.
"""

import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

NAME = "mpillm.comm._kernel"
NAMES = (
    *("MOST_RANKS", "SOURCE_HASH", "WAITING", "Operation", "Team", "SpscQueue"),
    *("combine", "scale", "widen", "narrow", "team_bytes", "spsc_queue_bytes"),
)
SOURCES = Path(__file__).parent / "csrc"
REBUILD = "pip install --no-deps --force-reinstall ."


def source_hash(sources: Path) -> str:
    """Hash the C sources in the order of their names, as meson.build does; "" without any."""
    files = sorted(sources.glob("*.[ch]"))
    if not files:
        return ""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def compiled_files() -> Iterator[Path]:
    """Yield the compiled modules for this Python: next to this file first, then installed ones."""
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    # site-packages may be absent from sys.path's front in a checkout, but not from the interpreter.
    folders = [Path(__file__).parents[2], *map(Path, sys.path), Path(sysconfig.get_path("platlib"))]
    for folder in dict.fromkeys(folders):
        path = folder / "mpillm" / "comm" / f"_kernel{suffix}"
        if path.is_file():
            yield path


def load_kernel() -> ModuleType:
    """Load the compiled module; warn on stderr where it was built from other C sources.

    Raises ImportError with the command that builds it where there is none.
    """
    path = next(compiled_files(), None)
    if path is None:
        raise ImportError(
            f"mpillm's compiled module is not installed for this Python; build it with `{REBUILD}`"
        )
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # First, for a module of another version may lack the hash, too.
    if missing := [name for name in NAMES if not hasattr(module, name)]:
        raise ImportError(
            f"{path} has no {', '.join(missing)}: it was built from another version of mpillm; "
            f"rebuild it with `{REBUILD}`"
        )
    # An installed package has no sources, and nothing to compare.
    here = source_hash(SOURCES)
    if here and here != module.SOURCE_HASH:
        # Not mpillm.system.console: a warning at import must not need the rest of the package.
        sys.stderr.write(
            f"mpillm: warning: the C sources in {SOURCES} differ from those that {path} was built "
            f"from; rebuild it with `{REBUILD}`\n"
        )
    return module


# Loaded once, at import: the names below are those of kernel.pyi.
_kernel = load_kernel()
MOST_RANKS: int = _kernel.MOST_RANKS
SOURCE_HASH: str = _kernel.SOURCE_HASH
WAITING: Mapping[str, float] = _kernel.WAITING
Operation, Team, SpscQueue = _kernel.Operation, _kernel.Team, _kernel.SpscQueue
combine, scale, widen, narrow = _kernel.combine, _kernel.scale, _kernel.widen, _kernel.narrow
team_bytes, spsc_queue_bytes = _kernel.team_bytes, _kernel.spsc_queue_bytes
