"""Where torch's compiler keeps its code: a private folder of TMPDIR, shared by a node's ranks."""

import os
import shutil
import stat
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def set_compile_cache(environment: MutableMapping[str, str] = os.environ) -> Path:
    """Name the compiler's folder in `environment`, for torch to find; return it.

    It stays after the process: the next start finds its code there. A name that the user has set is
    kept. What another user owns, or can write to, is not used: the code in it is run.
    """
    if named := environment.get(VARIABLE):
        return Path(named)
    folder = Path(tempfile.gettempdir()) / f"mpillm-compiled-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not _is_private(folder):
            folder = Path(tempfile.mkdtemp(prefix="mpillm-compiled-"))
    environment[VARIABLE] = str(folder)
    # A layer is one small graph: a pool of workers a rank would take more than it gives.
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    return folder


def _is_private(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def find_compiler(environment: Mapping[str, str] = os.environ) -> str:
    """Return the path of the C++ compiler that torch would take; "" where there is none."""
    for name in (environment.get("CXX", ""), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name, path=environment.get("PATH"))):
            return path
    return ""
