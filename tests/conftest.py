"""The suite is true at 1, 2, 3 and 4 ranks: `pytest`, then `mpirun -n N pytest`.

Tests take the communicator as the fixture `comm` and a folder that all ranks share as `folder`:
under mpirun only those run. Tests that start processes of their own (the command line, mpirun) use
the fixture `processes` and run serially.
"""

import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import mpi4py
import pytest

from mpillm.comm.world import open_world
from mpillm.launch.launchers import detect

# open_world starts MPI: then a lone process leaves no file in /dev/shm and TMPDIR.
mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
from mpi4py import MPI  # noqa: E402

if TYPE_CHECKING:
    import torch

WORLD = open_world(alone=not detect(os.environ).launcher)
# A background job of a shell ignores SIGINT, nohup SIGHUP, and verbs keep that: tests send them.
for number, default in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)
# A singleton start leaves these in the environment. A child mpirun that inherits them would take
# itself for a part of the parent's job.
FOREIGN = (
    "OMPI_",
    "PMIX_",
    "PRTE_",
    "PMI_",
    "HYDRA_",
    "HYDI_",
    "MPI_LOCAL",
    "I_MPI_HYDRA",
    "I_MPI_MPIRUN",
    "MV2_COMM",
    "MVP_COMM",
    "PALS_",
    "FLUX_TASK",
    "JSM_NAMESPACE",
    "SLURM_STEP",
    "SLURM_PROCID",
)
ALLOWED = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
# The device files of NVIDIA's, AMD's and Windows' drivers.
GPU_FILES = [path for name in ("nvidia[0-9]*", "kfd", "dxg") for path in Path("/dev").glob(name)]

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Begin = Callable[..., "subprocess.Popen[str]"]


# Their tests under `comm` train whole runs: half an hour, if each ran at each number of ranks.
ROOMS_OF_RUNS = ("infer", "train")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--turns",
        action="store_true",
        help="run each test of whole runs at one of 2, 3 and 4 ranks, and a third of them serially",
    )


@pytest.hookimpl(trylast=True)  # the reporter must be there
def pytest_configure(config: pytest.Config) -> None:
    """Rank 0 speaks."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if WORLD.rank and reporter:
        reporter._tw._file = Path(os.devnull).open("w")  # noqa: SIM115


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select by fixtures: under mpirun the tests that use the communicator.

    A test that starts processes of its own uses the fixture `processes`, mostly through another
    one (`python`, `mpillm`). It runs in the serial pass only, and never in the fast tier.
    """
    left_out = []
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "processes" not in fixtures and not item.get_closest_marker("slow"):
            item.add_marker("fast")
        parallel = "comm" in fixtures and "processes" not in fixtures
        runs = _numbers_of_ranks(item, config.getoption("--turns") and parallel)
        if WORLD.size not in runs or (WORLD.size > 1 and not parallel):
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _numbers_of_ranks(item: pytest.Item, turns: bool) -> tuple[int, ...]:
    """Return the numbers of ranks that a test runs at, up to the size of this job."""
    marker = item.get_closest_marker("ranks")
    numbers = tuple(marker.args) if marker else tuple(range(1, max(WORLD.size, 4) + 1))
    room = item.path.relative_to(Path(__file__).parent).parts[0]
    several = [number for number in numbers if number > 1]
    if not turns or room not in ROOMS_OF_RUNS or not several:
        return numbers
    chance = zlib.crc32(item.nodeid.encode())
    own = several[chance % len(several)]
    return (1, own) if 1 in numbers and chance // 12 % 3 == 0 else (own,)


def pytest_collection_finish() -> None:
    """Keep what is loaded out of the collector's view: a collection takes a tenth of the time."""
    gc.collect()
    gc.freeze()


SLOWEST, SLOW_SECONDS = 30, 30.0
# Fewer tests are a part of the suite, whose times say nothing of the whole.
WHOLE_PASS = 250
seconds_of: dict[str, float] = {}
reason_of: dict[str, str] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the slowest tests; one over 30 s should say why: `@pytest.mark.slow("why")`."""
    slowest = sorted(seconds_of.items(), key=lambda test: -test[1])[:SLOWEST]
    if len(seconds_of) < WHOLE_PASS:
        return
    terminalreporter.section(f"the {SLOWEST} slowest tests, set-up included")
    for name, seconds in slowest:
        missing = "no reason given: shorten it, or mark it slow" if seconds > SLOW_SECONDS else ""
        terminalreporter.write_line(
            f"{seconds:7.1f} s  {name}  {reason_of.get(name, missing)}".rstrip()
        )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """End the job with the report of a rank that fails under mpirun.

    The other ranks would else wait for its message without end.
    """
    outcome = yield
    report = outcome.get_result()
    seconds_of[item.nodeid] = seconds_of.get(item.nodeid, 0.0) + report.duration
    slow = item.get_closest_marker("slow")
    if slow and slow.args:
        reason_of[item.nodeid] = str(slow.args[0])
    if report.failed and WORLD.size > 1:
        item.config.pluginmanager.getplugin("capturemanager").suspend_global_capture(in_=True)
        print(
            f"\nrank {WORLD.rank} of {WORLD.size} failed in {item.nodeid}\n{report.longreprtext}",
            file=sys.stderr,
        )
        sys.stderr.flush()
        WORLD.Abort(1)


@pytest.fixture(scope="session")
def processes() -> None:
    """Say that the test starts processes of its own."""


@pytest.fixture(scope="session")
def comm() -> MPI.Intracomm:
    return WORLD


SHOWN: list[bool] = []
"""Not empty while a test may see GPUs."""


@pytest.fixture(scope="session", autouse=True)
def _hidden_gpus() -> Iterator[None]:
    """Hide GPUs from tests that do not ask for one: what they expect is the CPU's."""
    if not GPU_FILES:
        yield
        return
    import torch

    known = torch.cuda.is_available
    torch.cuda.is_available = lambda: bool(SHOWN) and known()
    yield
    torch.cuda.is_available = known


@pytest.fixture
def gpu(comm: MPI.Intracomm) -> "Iterator[torch.device]":
    """This rank's GPU, which ranks share where there are fewer; without one the test is skipped.

    Tests that take it are marked `gpu`.
    """
    import torch

    SHOWN.append(True)
    try:
        if not torch.cuda.is_available():
            pytest.skip(f"needs a GPU, and torch for it; this is torch {torch.__version__}")
        if comm.size > 1:
            pytest.importorskip("cupy", reason="several ranks with GPUs need CuPy (mpillm[cuda12])")
        number = comm.rank % torch.cuda.device_count()
        torch.cuda.set_device(number)
        yield torch.device("cuda", number)
    finally:
        SHOWN.clear()


@contextmanager
def temporary_folder(comm: MPI.Intracomm) -> Iterator[Path]:
    """Make a folder, the same one on each rank; remove it when all ranks have left the block."""
    path = Path(comm.bcast(tempfile.mkdtemp(prefix="mpillm-test-") if comm.rank == 0 else None))
    yield path
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def folder(comm: MPI.Intracomm) -> Iterator[Path]:
    """An empty folder, the same one on each rank, for one test."""
    with temporary_folder(comm) as path:
        yield path


@pytest.fixture(scope="session")
def shared_folder(comm: MPI.Intracomm) -> Iterator[Path]:
    """A folder for what many tests read: made once a session, the same one on each rank.

    A fixture writes into a folder of its own inside; tests write nothing.
    """
    with temporary_folder(comm) as path:
        yield path


@pytest.fixture
def published(folder: Path, comm: MPI.Intracomm) -> Path:
    """Write a small published model, which a test may change."""
    pytest.importorskip("safetensors")
    from tests.published import publish

    if comm.rank == 0:
        publish(folder / "hub")
    comm.Barrier()
    return folder / "hub"


@pytest.fixture(scope="session")
def documents(shared_folder: Path, comm: MPI.Intracomm) -> Path:
    """A folder of 200 short documents of made-up sentences, the same in every run."""
    path = shared_folder / "documents"
    if comm.rank == 0:
        chance = random.Random(7)
        words = [
            "".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(300)
        ]
        path.mkdir()
        for number in range(200):
            sentences = [
                " ".join(chance.choices(words, k=8)) + ".\n" for _ in range(chance.randint(3, 12))
            ]
            (path / f"{number:03d}.txt").write_text("".join(sentences))
    comm.Barrier()
    return path


def clean_environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k in ALLOWED or not k.startswith(FOREIGN)}
    if os.geteuid() == 0:
        kept |= dict.fromkeys(ALLOWED, "1")
    # Children run the same files as the tests: those of the checkout.
    own = {
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        # More ranks than cores: waiting ranks yield.
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    if GPU_FILES:
        own |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    return kept | own | extra


def mpirun_command(ranks: int) -> list[str]:
    """How this site's mpirun starts `ranks` processes, more than the cores if need be."""
    folders = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    mpirun = shutil.which("mpirun", path=folders) or shutil.which("mpiexec", path=folders)
    assert mpirun, "the suite needs an mpirun; jobs/test.sh installs one"
    oversubscribe = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    return [
        mpirun,
        "-n",
        str(ranks),
        *(oversubscribe if "Open MPI" in MPI.Get_library_version() else []),
    ]


def python_command(
    arguments: Sequence[str | Path],
    ranks: int,
    before: Sequence[str] = (),
    executable: str | Path = sys.executable,
) -> list[str]:
    return [
        *before,
        *(mpirun_command(ranks) if ranks > 1 else []),
        str(executable),
        *map(str, arguments),
    ]


@pytest.fixture
def begin(processes: None) -> Iterator[Begin]:
    """Begin `mpillm ARGUMENTS…` on `ranks` processes and return the process.

    It is killed at the end of the test.
    """
    begun: list[subprocess.Popen[str]] = []

    def start(
        *arguments: str | Path, ranks: int = 1, **environment: str
    ) -> "subprocess.Popen[str]":
        command = python_command(["-m", "mpillm", *arguments], ranks)
        process = subprocess.Popen(
            command,
            env=clean_environment(**environment),
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        begun.append(process)
        return process

    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def python(processes: None) -> Run:
    """Run `python ARGUMENTS…` on `ranks` processes, under mpirun when more than one.

    Returns the output and the exit code. `before`: a command that starts the one that is made.
    `executable`: another Python than the suite's.
    """

    def run(
        *arguments: str | Path,
        ranks: int = 1,
        timeout: float = 240,
        before: Sequence[str] = (),
        executable: str | Path = sys.executable,
        cwd: str | Path | None = None,
        **environment: str,
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            python_command(arguments, ranks, before, executable),
            cwd=cwd,
            env=clean_environment(**environment),
            timeout=timeout,
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def mpillm(python: Run) -> Run:
    """Run `mpillm ARGUMENTS…` as a user would; `ranks=2` starts it under mpirun."""

    def run(*arguments: str | Path, **settings: object) -> "subprocess.CompletedProcess[str]":
        return python("-m", "mpillm", *arguments, **settings)

    return run
