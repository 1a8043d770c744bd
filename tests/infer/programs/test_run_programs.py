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
needs_sandbox = pytest.mark.skipif(not has_sandbox(), reason="needs user namespaces and Landlock")


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
assert refused(lambda: os.listdir({str(Path.home())!r}))
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
    child.write_text("import os, sys; sys.stderr.write('Landlock: no')")
    monkeypatch.setattr(module, "CHILD", child)
    with pytest.raises(UsageError, match="this host gives none: Landlock: no; score them on"):
        score_programs([["pass"], ["pass"]], ["pass@1"], comm, LIMITS)


@pytest.mark.usefixtures("processes")
def test_the_script_imports_nothing_of_ours() -> None:
    code = "import sys, runpy; sys.path[:0] = []; runpy.run_path(sys.argv[1], run_name='x')"
    code += "; assert not [n for n in sys.modules if n.startswith('mpillm')]"
    subprocess.run([sys.executable, "-I", "-S", "-c", code, str(module.CHILD)], check=True)
