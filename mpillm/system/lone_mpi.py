"""MPI in a process that no launcher started: it begins wherever it is, and leaves no file.

Open MPI 5 leaves a folder in TMPDIR and a segment of 16 MiB in /dev/shm after each such process:
pull request 13261 of github.com/open-mpi/ompi. MPICH leaves a segment where the process is killed.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mpillm.errors import LaunchError
from mpillm.system.ending_signals import deferred_signals

# Messages to itself alone, and no daemon next to it (Open MPI 4). A user's own settings stay.
SETTINGS = {"OMPI_MCA_btl": "self", "OMPI_MCA_ess_singleton_isolated": "1"}
SHARED_MEMORY = "/dev/shm/"


@contextmanager
def lone_environment(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield the environment in which a process, or its child, may start MPI alone.

    Its folder for temporary files exists within the block only: nothing in it is needed after
    MPI_Init. Raises LaunchError where no such folder can be made.
    """
    folder = ""
    try:
        with deferred_signals():
            folder = _make_folder()
        yield {**SETTINGS, **with_home(environment), "TMPDIR": folder}
    finally:
        with deferred_signals():
            shutil.rmtree(folder, ignore_errors=True)


def _make_folder() -> str:
    try:
        return tempfile.mkdtemp(prefix="mpillm-mpi-")
    except OSError as failure:
        raise LaunchError(
            "no file can be written into TMPDIR or /tmp; free some space there, set TMPDIR to a "
            "folder of yours, or raise the limit of file sizes (ulimit -f)"
        ) from failure


def with_home(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with HOME, without which Open MPI 5 does not start."""
    try:
        home = str(Path.home())
    except RuntimeError:
        # A user id without a name, as in some containers.
        home = "/"
    return {"HOME": home, **environment}


@contextmanager
def starting_mpi(alone: bool) -> Iterator[None]:
    """Let the block call MPI_Init; afterwards the environment is what it was before.

    `alone`: no launcher started this process. What MPI has put into /dev/shm then loses its name:
    the process keeps it mapped, and the system frees it with the process.
    """
    with deferred_signals():
        if not alone:
            with _changed_environment(with_home(os.environ)):
                yield
            return
        mapped = set(shared_files())
        try:
            with lone_environment(os.environ) as changed, _changed_environment(changed):
                yield
        finally:
            for path in set(shared_files()) - mapped:
                with suppress(OSError):
                    path.unlink()


@contextmanager
def _changed_environment(changed: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def shared_files(maps: Path = Path("/proc/self/maps")) -> list[Path]:
    """Return the files of /dev/shm that this process has mapped; [] where Linux lists none."""
    try:
        lines = maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    # Five fields come before the path, which may hold spaces.
    places = [line.split(maxsplit=5)[-1] for line in lines if SHARED_MEMORY in line]
    return [Path(place) for place in places if not place.endswith(" (deleted)")]
