"""Programs pass by their tests alone, and do nothing to the host."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.errors import UsageError
from mpillm.infer.programs import run_programs as module
from mpillm.infer.programs.run_programs import ProgramLimits, joined_program, passes, score_programs

PROMPT = "def add(a, b):\n"
TEST = "def check(add):\n    assert add(2, 3) == 5\n"
RIGHT, WRONG = "    return a + b\n", "    return a - b\n"
LIMITS = ProgramLimits(seconds=1)


def has_sandbox() -> bool:
    try:
        return passes("pass")
    except UsageError:
        return False


# Once: user namespaces are off on some hosts, and in some containers.
needs_sandbox = pytest.mark.skipif(not has_sandbox(), reason="needs user namespaces with mounts")


@needs_sandbox
def test_pass_at_k_of_sampled_programs(comm: MPI.Intracomm) -> None:
    programs = [
        [joined_program(PROMPT, each, TEST, "add") for each in samples]
        for samples in ([RIGHT, WRONG], [WRONG, WRONG], [RIGHT, RIGHT])
    ]
    score = score_programs(programs, ["pass@1"], comm, LIMITS)
    assert score.values["pass@1"] == 0.5
    assert score.rows == 3
    assert comm.allgather(score) == [score] * comm.size
    with pytest.raises(UsageError, match="pass@10 needs 10 samples"):
        score_programs(programs[:1], ["pass@10"], comm, LIMITS)


@needs_sandbox
@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "import os; os._exit(77)",
        "import sys; sys.exit(77)",
        "assert False",
        "def f(:",
        "while True: pass",
        "x = bytearray(1 << 30)",
        "import time; time.sleep(60)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL); raise ValueError",
        "open('large', 'wb').write(b'0' * (64 << 20))",
    ],
)
def test_what_does_not_run_to_its_end_has_not_passed(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STARTING_SECONDS", 1.0)
    assert not passes(program, LIMITS)


@needs_sandbox
@pytest.mark.usefixtures("processes")
def test_a_program_has_no_network_no_files_and_no_environment(tmp_path: Path) -> None:
    secret, target = tmp_path / "secret", tmp_path / "written"
    secret.write_text("s")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"""
import os, socket, json, random, collections
def refused(work):
    try:
        work()
    except OSError:
        return True
    return False
assert refused(lambda: open({str(secret)!r}).read())
assert refused(lambda: open({str(target)!r}, "w"))
assert refused(lambda: os.listdir({str(tmp_path)!r}))
assert refused(lambda: open("/proc/self/environ").read())
assert refused(lambda: socket.create_connection(("127.0.0.1", {port}), 1))
assert set(os.environ) <= {{"LD_LIBRARY_PATH", "LC_CTYPE"}}
open("own", "w").write("x")
assert open("own").read() == "x"
"""
        assert passes(program, ProgramLimits())
    assert not target.exists()


@needs_sandbox
@pytest.mark.usefixtures("processes")
def test_nothing_outside_is_changed_or_reached(tmp_path: Path) -> None:
    """Modes, owners and times, the host's sockets, and what could undo the sandbox."""
    mine, path = tmp_path / "mine", str(tmp_path / "socket")
    mine.write_text("kept")
    before = mine.stat()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(1)
        program = f"""
import ctypes, os, socket, sys
def refused(work):
    try:
        work()
    except OSError:
        return True
    return False
for place in ({str(mine)!r}, os.__file__, sys.executable, "/usr"):
    assert refused(lambda: os.chmod(place, 0))
    assert refused(lambda: os.utime(place, (0, 0)))
    assert refused(lambda: os.truncate(place, 0))
    assert refused(lambda: os.chown(place, os.getuid(), -1))
assert refused(lambda: open("/new", "w"))
assert refused(lambda: socket.socket(socket.AF_UNIX).connect({path!r}))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(b"tmpfs", b"/usr", b"tmpfs", 0, None)
assert libc.umount2(b"/usr", 2)
# Namespaces of its own give it no more: what is mounted is locked there.
libc.unshare(0x10020000)
assert libc.umount2(b"/usr", 2)
assert libc.mount(None, b"/usr", None, ctypes.c_ulong(32 | 4096), None)
assert refused(lambda: os.chmod("/usr", 0o700))
"""
        assert passes(program, ProgramLimits())
    after = mine.stat()
    assert (before.st_mode, before.st_mtime, before.st_size) == (
        after.st_mode,
        after.st_mtime,
        after.st_size,
    )


@needs_sandbox
@pytest.mark.usefixtures("processes")
def test_what_a_program_leaves_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders deeper than a path can be, folders without rights, and a report without end."""
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    deep = "import os\nfor _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')\n"
    locked = "import os\nos.mkdir('a')\nopen('a/b', 'w').close()\nos.chmod('a', 0)\n"
    assert passes(deep, ProgramLimits())
    assert passes(locked, ProgramLimits())
    flood = """
import os, stat
def is_pipe(n):
    try:
        return stat.S_ISFIFO(os.fstat(n).st_mode)
    except OSError:
        return False
[report] = filter(is_pipe, range(3, 30))
while True:
    os.write(report, b"x" * (1 << 20))
"""
    assert not passes(flood, LIMITS)
    assert not list(tmp_path.iterdir())


@needs_sandbox
@pytest.mark.usefixtures("processes")
def test_no_process_outlives_its_program() -> None:
    mark = f"mpillm-{os.getpid()}"
    program = f"""
import os, sys, time
for _ in range(3):
    if not os.fork():
        os.setsid()
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(30)", {mark!r}])
time.sleep(0.3)
"""
    assert passes(program, ProgramLimits())
    for _ in range(50):
        found = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _has(path, mark)]
        if not found:
            break
        time.sleep(0.1)
    assert not found


def _has(path: Path, mark: str) -> bool:
    try:
        return mark.encode() in path.read_bytes()
    except OSError:
        return False


def test_a_host_without_a_sandbox_is_named(
    comm: MPI.Intracomm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    child.write_text("import os, sys; sys.stderr.write('mounts: no')")
    monkeypatch.setattr(module, "CHILD", child)
    with pytest.raises(UsageError, match="this host gives none: mounts: no; score them on"):
        score_programs([["pass"], ["pass"]], ["pass@1"], comm, LIMITS)


@pytest.mark.usefixtures("processes")
def test_the_script_imports_nothing_of_ours() -> None:
    code = "import sys, runpy; sys.path[:0] = []; runpy.run_path(sys.argv[1], run_name='x')"
    code += "; assert not [n for n in sys.modules if n.startswith('mpillm')]"
    subprocess.run([sys.executable, "-I", "-S", "-c", code, str(module.CHILD)], check=True)
