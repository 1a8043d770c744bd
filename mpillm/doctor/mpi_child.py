"""A child of doctor: which MPI mpi4py finds and, when asked, whether MPI_Init ends well.

`mpi_child.py SYS_PATH look|init` writes a JSON object, {"mpi4py", "library", "files"}, where `files` are the lines of
/proc/self/maps that name an MPI library; and after MPI_Init another, {"thread_level"}.
"""

import json
import sys
from pathlib import Path
from typing import Any


def files(maps: Path = Path("/proc/self/maps")) -> str:
    try:
        lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(line for line in lines if "libmpi" in line)


def main() -> None:
    sys.path += [folder for folder in json.loads(sys.argv[1]) if folder not in sys.path]
    import mpi4py

    # Which library it is can be asked before MPI_Init, that may end the process.
    mpi4py.rc.initialize = False
    from mpi4py import MPI

    write({"mpi4py": mpi4py.__version__, "library": MPI.Get_library_version(), "files": files()})
    if sys.argv[2] == "init":
        write({"thread_level": MPI.Init_thread(MPI.THREAD_MULTIPLE)})
        MPI.Finalize()


def write(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
