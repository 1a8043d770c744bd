"""A child of doctor: find the MPI of mpi4py and, with `init`, call MPI_Init.

`mpi_child.py SYS_PATH look|init` prints a JSON object, {"mpi4py", "library", "files"}: `files` are
the lines of /proc/self/maps that name an MPI library. After MPI_Init it prints {"thread_level"}.
"""

import json
import sys
from pathlib import Path
from typing import Any


def mpi_files(maps: Path = Path("/proc/self/maps")) -> str:
    try:
        lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(line for line in lines if "libmpi" in line)


def main() -> None:
    sys.path += [folder for folder in json.loads(sys.argv[1]) if folder not in sys.path]
    import mpi4py

    # The library's version needs no MPI_Init, which may end the process.
    mpi4py.rc.initialize = False
    from mpi4py import MPI

    write_line(
        {"mpi4py": mpi4py.__version__, "library": MPI.Get_library_version(), "files": mpi_files()}
    )
    if sys.argv[2] == "init":
        write_line({"thread_level": MPI.Init_thread(MPI.THREAD_MULTIPLE)})
        MPI.Finalize()


def write_line(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
