"""A process without mpirun leaves nothing in TMPDIR and /dev/shm, and needs no HOME."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mpillm.errors import LaunchError
from mpillm.system import lone_mpi

OPEN = """
import os, signal, sys
from mpillm.comm.world import open_world
from mpillm.system.lone_mpi import shared_files
before = dict(os.environ)
comm = open_world(alone=True)
assert comm.size == 1 and comm.allreduce(3) == 3
comm.Dup().Free()
print(dict(os.environ) == before, shared_files(), os.listdir(os.environ["TMPDIR"]))
sys.stdout.flush()
"""
ENDS = {
    "success": ("", 0),
    "error": ("raise SystemExit(3)", 3),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    "SIGKILL": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    "exit without a word": ("os._exit(5)", 5),
}


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("end", list(ENDS))
def test_nothing_is_left_after_any_end(python: Any, tmp_path: Path, end: str) -> None:
    code, expected = ENDS[end]
    done = python("-c", OPEN + code, TMPDIR=str(tmp_path))
    assert done.stdout == "True [] []\n", done.stderr
    assert done.returncode == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("bench", "gemm", "--sizes", "16", "--iterations", "1"), 0),
        (("bench", "gemm", "--profile", "none.json"), 2),
        (("--version", "--verbose"), 0),
    ],
)
def test_a_verb_leaves_nothing(mpillm: Any, tmp_path: Path, words: Any, code: int) -> None:
    done = mpillm(*words, TMPDIR=str(tmp_path))
    assert done.returncode == code, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    "setting", [{"TMPDIR": "/nowhere"}, {"TMPDIR": "/etc/passwd"}, {"TMPDIR": ""}, {"HOME": ""}]
)
def test_a_lone_process_starts_wherever_it_is(python: Any, setting: dict[str, str]) -> None:
    code = OPEN.partition("print")[0] + "print('ok')"
    done = python(
        "-c",
        "import os\nos.environ.pop('HOME') if not os.environ['HOME'] else 0\n" + code,
        **setting,
    )
    assert (done.stdout, done.stderr) == ("ok\n", "")


def test_a_users_own_settings_stay() -> None:
    given = {"OMPI_MCA_btl": "tcp,self", "HOME": "/mine", "TMPDIR": "/scratch"}
    with lone_mpi.lone_environment(given) as made:
        folder = Path(made["TMPDIR"])
        assert folder.is_dir()
        assert made == {**lone_mpi.SETTINGS, **given, "TMPDIR": str(folder)}
    assert not folder.exists()
    assert lone_mpi.with_home({})["HOME"].startswith("/")


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere/at/all")
    with pytest.raises(LaunchError, match="TMPDIR"), lone_mpi.lone_environment({}):
        raise AssertionError


def test_the_maps_of_a_process(tmp_path: Path) -> None:
    (tmp_path / "maps").write_text(
        "7f00-7f01 rw-s 00000000 00:19 17 /dev/shm/mpich_shm_1_0\n"
        "7f00-7f01 rw-s 00000000 00:19 18 /dev/shm/gone (deleted)\n"
        "7f00-7f01 rw-s 00000000 00:19 19 /dev/shm/a name\n"
        "7f00-7f01 rw-p 00000000 00:00 0 \n"
    )
    found = lone_mpi.shared_files(tmp_path / "maps")
    assert list(map(str, found)) == ["/dev/shm/mpich_shm_1_0", "/dev/shm/a name"]
    assert lone_mpi.shared_files(tmp_path / "none") == []
    assert os.environ.get("TMPDIR") != str(tmp_path)
