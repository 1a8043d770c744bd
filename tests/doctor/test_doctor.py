"""`mpillm doctor` on real, planted faults: it names each with a remedy, and leaves with 1."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpillm.machine.cluster_profile import Cluster, ClusterProfile
from tests.namespaces import namespace

pytestmark = pytest.mark.usefixtures("processes")
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
TWO_HOSTS = Path(__file__).parents[1] / "fixtures" / "two_hosts.sh"
TWO_HOSTS_UNAVAILABLE = 77
DOCTOR = ("-m", "mpillm", "doctor")
SHELL = "import os, sys; os.execvp('sh', ['sh', *sys.argv[1:]])"
OPEN_MPI = "Open MPI" in MPI.Get_library_version()


class Report:
    """What `mpillm doctor --json` printed, and its exit code."""

    def __init__(self, done):
        self.code, self.text = done.returncode, done.stdout + done.stderr
        start = done.stdout.find("{")
        assert start >= 0, self.text
        self.json, end = json.JSONDecoder().raw_decode(done.stdout[start:])
        assert "{" not in done.stdout[start + end :], "the report should be printed once"

    def findings(self, area, verdict=None):
        return [
            finding
            for finding in self.json["findings"]
            if finding["area"] == area and verdict in (None, finding["verdict"])
        ]

    def fault(self, area, verdict, *words):
        """Return the only finding of that verdict with all `words`; it must have a remedy."""
        fitting = [
            finding
            for finding in self.findings(area, verdict)
            if all(word in finding["name"] + " " + finding["found"] for word in words)
        ]
        assert len(fitting) == 1, self.text
        assert fitting[0]["remedy"], fitting
        assert self.code == 1 or verdict == "warning", self.text
        return fitting[0]


@pytest.fixture
def doctor(python, folder):
    """Run `mpillm doctor --json ARGUMENTS…` in the folder `folder` and read its report."""

    def run(*arguments, **settings):
        return Report(python(*DOCTOR, "--json", folder, *arguments, **({"PATH": PATH} | settings)))

    return run


def mpiruns():
    """Return every mpirun on PATH with its --version."""
    found = [
        Path(place) / "mpirun"
        for place in PATH.split(os.pathsep)
        if (Path(place) / "mpirun").exists()
    ]
    return {
        path: subprocess.run(
            [path, "--version"], text=True, capture_output=True, check=False
        ).stdout
        for path in found
    }


def test_a_healthy_machine_has_no_error(doctor):
    report = doctor()
    assert report.code == 0, report.text
    assert report.json["counts"]["error"] == 0
    assert report.json["verdict"] in ("ok", "warning")
    assert {"software", "MPI", "host", "network", "GPU", "folders", "batch system"} <= {
        finding["area"] for finding in report.json["findings"]
    }
    assert len(report.json["hosts"]) == 1


def test_healthy_ranks_have_no_error_and_one_voice(doctor, folder):
    report = doctor(ranks=2)
    assert report.code == 0, report.text
    assert report.json["counts"]["error"] == 0
    (neighbours,) = report.findings("neighbours")
    assert "1 pair" in neighbours["found"]
    assert "GB/s" in neighbours["found"]
    assert not list(folder.iterdir()), "no file is left"


def test_the_table_is_readable_at_100_columns(python, folder):
    done = python(*DOCTOR, folder, "--gpus", "77", PATH=PATH)
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert max(len(line) for line in lines if str(folder) not in line) <= 100
    assert lines[-1].startswith("doctor: 1 error, ")
    assert any(line.startswith("  error    count") for line in lines)
    assert any(line.strip().startswith("→ ask the batch system") for line in lines)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_tiny_dev_shm(doctor, ranks):
    before = namespace("mount -t tmpfs -o size=1m tmpfs /dev/shm")
    found = doctor(ranks=ranks, before=before).fault(
        "host", "error", "/dev/shm", "1.0 MiB", "too small"
    )
    assert "--shm-size=" in found["remedy"]
    assert "remount,size=" in found["remedy"]


def test_one_core_for_four_ranks(doctor):
    core = str(min(os.sched_getaffinity(0)))
    report = doctor(ranks=4, before=["taskset", "-c", core])
    found = report.fault("host", "error", "cores", "4 ranks on 1 core")
    assert "--ntasks=4" in found["remedy"]
    assert "mpirun -n" in found["remedy"]


def test_a_missing_package(folder):
    """An environment with all of this one's packages but h5py."""
    venv.create(folder / "environment", symlinks=True)
    here = Path(sysconfig.get_path("purelib"))
    there = next((folder / "environment").glob("lib/python*/site-packages"))
    for path in here.iterdir():
        if not path.name.lower().startswith("h5py"):
            (there / path.name).symlink_to(path)
    # mpi4py loads the MPI of its own environment.
    for library in here.parents[1].glob("*mpi*"):
        (there.parents[1] / library.name).symlink_to(library)
    program = [folder / "environment/bin/python", *DOCTOR, "--json", folder]
    done = subprocess.run(
        program, env=os.environ | {"PATH": PATH}, text=True, capture_output=True, check=False
    )
    report = Report(done)
    found = report.fault("software", "error", "h5py", "not installed", "mpillm needs h5py>=")
    assert found["remedy"].startswith("pip install 'h5py>=")
    (packages,) = (
        finding for finding in report.findings("software", "ok") if finding["name"] == "packages"
    )
    assert "numpy" in packages["found"]


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
static int refuse(void) { errno = ENOLCK; return -1; }
int flock(int fd, int operation) { (void)fd; (void)operation; return refuse(); }
static int pass(const char *name, int fd, int command, void *argument) {
    if (command == F_SETLK || command == F_SETLKW) return refuse();
    return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, name))(fd, command, argument);
}
int fcntl(int fd, int command, ...) {
    va_list list; va_start(list, command); void *argument = va_arg(list, void *); va_end(list);
    return pass("fcntl", fd, command, argument);
}
int fcntl64(int fd, int command, ...) {
    va_list list; va_start(list, command); void *argument = va_arg(list, void *); va_end(list);
    return pass("fcntl64", fd, command, argument);
}
"""


@pytest.fixture(scope="module")
def no_locks(tmp_path_factory):
    """Build a library that refuses every lock, as NFS does without its lock daemon."""
    folder = tmp_path_factory.mktemp("shim")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("the shim that refuses locks needs a C compiler")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"],
        check=True,
    )
    return folder / "shim.so"


def profile_of_another_cluster(path):
    name, version = MPI.get_vendor()
    other = Cluster("Another Processor 9000", 128, name, ".".join(map(str, version)), 1, 128)
    ClusterProfile("2024-01-01T00:00:00Z", other).save(path)
    return path


@pytest.fixture(scope="module")
def ill(python, tmp_path_factory, no_locks):
    """Start once on a host with several faults, each in a folder or an option of its own."""
    root = tmp_path_factory.mktemp("ill")
    folders = {name: root / name for name in ("whole", "readonly", "full", "inodes")}
    for folder in folders.values():
        folder.mkdir()
    mount = "mount -t tmpfs -o"
    script = " && ".join(
        [
            f"{mount} ro tmpfs {folders['readonly']}",
            f"{mount} size=1m tmpfs {folders['full']}",
            f"! dd if=/dev/zero of={folders['full']}/all bs=64k 2>/dev/null",
            f"{mount} nr_inodes=2 tmpfs {folders['inodes']}",
            f"touch {folders['inodes']}/last",
        ]
    )
    done = python(
        *DOCTOR,
        "--json",
        *folders.values(),
        *("--hosts", "192.0.2.1"),
        *("--profile", profile_of_another_cluster(root / "profile.json")),
        before=namespace(script, "mount", "net"),
        PATH=PATH,
        LD_PRELOAD=str(no_locks),
    )
    return Report(done), folders


def test_a_read_only_folder(ill):
    report, folders = ill
    found = report.fault("folders", "error", str(folders["readonly"]), "read-only", "tmpfs")
    assert "mounted for writing" in found["remedy"]


def test_a_full_disk(ill):
    report, folders = ill
    found = report.fault("folders", "error", str(folders["full"]), "full", "0 B free of 1.0 MiB")
    assert "delete what is no longer needed" in found["remedy"]


def test_a_disk_without_inodes(ill):
    report, folders = ill
    found = report.fault("folders", "error", str(folders["inodes"]), "inodes")
    assert "small files" in found["remedy"]


def test_locking_is_refused(ill):
    report, folders = ill
    name = f"{folders['whole']}: locks"
    found = report.fault("folders", "warning", name, "locking refused", "flock", "fcntl", "ENOLCK")
    assert "export HDF5_USE_FILE_LOCKING=FALSE" in found["remedy"]


def test_a_host_that_cannot_be_reached(ill):
    found = ill[0].fault("hosts", "error", "192.0.2.1", "cannot be reached", "unreachable")
    assert "ping 192.0.2.1" in found["remedy"]


def test_a_stale_cluster_profile(ill):
    found = ill[0].fault("cluster profile", "warning", "stale", "Another Processor 9000")
    assert "mpillm bench all --save" in found["remedy"]


@pytest.fixture(scope="module")
def mistyped(python, tmp_path_factory):
    """Start once with all options wrong."""
    folder = tmp_path_factory.mktemp("mistyped")
    (folder / "site.toml").write_text("colour = 'blue'\n")
    names = {"--profile": "none.json", "--site": "site.toml"}
    files = [word for option, name in names.items() for word in (option, folder / name)]
    gpus = torch.cuda.device_count() + 4
    done = python(
        *DOCTOR,
        "--json",
        folder / "nowhere",
        *files,
        "--gpus",
        gpus,
        "--hosts",
        "nowhere.invalid",
        PATH=PATH,
    )
    return Report(done), folder, gpus


def test_a_wrong_number_of_gpus(mistyped):
    report, _, gpus = mistyped
    assert (
        "--gpus-per-node" in report.fault("GPU", "error", f"{gpus} should be by --gpus")["remedy"]
    )


def test_a_host_whose_name_does_not_resolve(mistyped):
    found = mistyped[0].fault("hosts", "error", "nowhere.invalid", "no address")
    assert "getent hosts nowhere.invalid" in found["remedy"]


def test_a_missing_folder(mistyped):
    report, folder, _ = mistyped
    found = report.fault("folders", "error", "no such folder")
    assert f"mkdir -p {folder / 'nowhere'}" in found["remedy"]


def test_a_missing_cluster_profile(mistyped):
    found = mistyped[0].fault("cluster profile", "error", "there is no profile")
    assert "mpillm bench all --save" in found["remedy"]


def test_a_broken_site_file(mistyped):
    report, folder, _ = mistyped
    found = report.fault("batch system", "error", "site file", "colour")
    assert str(folder / "site.toml") in found["remedy"]


def test_no_mpi_library(doctor, folder):
    """mpi4py that finds no library, as where the module is not loaded."""
    package = folder / "packages" / "mpi4py"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("class rc: initialize = True\n__version__ = '4.0'\n")
    (package / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')\n")
    path = os.pathsep.join([str(folder / "packages"), os.environ.get("PYTHONPATH", "")])
    report = doctor(PYTHONPATH=path)
    found = report.fault("MPI", "error", "library", "cannot load MPI library")
    assert "module load" in found["remedy"]
    assert report.findings("folders"), "all else is reported too"


def test_the_mpirun_of_another_mpi(python, folder):
    family = "HYDRA" if OPEN_MPI else "Open MPI"
    foreign = [path for path, says in mpiruns().items() if family in says]
    if not foreign:
        pytest.skip("there is no other MPI's mpirun on PATH")
    report = Report(
        python(*DOCTOR, "--json", folder, before=[str(foreign[0]), "-n", "2"], PATH=PATH)
    )
    found = report.fault("MPI", "error", "launcher", "started 2 processes")
    assert "mpirun" in found["remedy"]
    # … and where it comes first on PATH, it is found before anyone is misled by it.
    path = os.pathsep.join([str(foreign[0].parent), PATH])
    alone = Report(python(*DOCTOR, "--json", folder, PATH=path))
    alone.fault("MPI", "error", "mpirun", str(foreign[0]), "each rank would be alone")


def test_processes_of_another_launcher():
    """Two processes with the variables of the other MPI's mpirun, which MPI does not join."""
    launcher = (
        {"PMI_RANK": "{}", "PMI_SIZE": "2", "MPI_LOCALRANKID": "{}"}
        if OPEN_MPI
        else {
            f"OMPI_COMM_WORLD_{word}": "2" if word == "SIZE" else "{}"
            for word in ("RANK", "LOCAL_RANK", "SIZE")
        }
        | {"PMIX_RANK": "{}"}
    )
    running = [
        subprocess.Popen(
            [sys.executable, *DOCTOR, "--json"],
            env=os.environ
            | {"PATH": PATH}
            | {name: value.format(rank) for name, value in launcher.items()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [1, 1]
    first = Report(subprocess.CompletedProcess([], 1, *texts[0]))
    found = first.fault("MPI", "error", "launcher", "2 processes")
    assert "start them with the mpirun of" in found["remedy"]
    assert texts[1][0] == ""


@pytest.mark.multihost
def test_two_hosts_are_compared_and_a_folder_that_is_not_shared_is_found(python, folder):
    def on_two_hosts(*command):
        return python("-c", SHELL, TWO_HOSTS, "--ranks-per-host", "2,1", *command, PATH=PATH)

    # Open MPI 5 may wait for ever for processes that end at once.
    tried = on_two_hosts("sleep", "1")
    if tried.returncode == TWO_HOSTS_UNAVAILABLE:
        pytest.skip(tried.stderr.strip().splitlines()[-1])
    report = Report(on_two_hosts(sys.executable, *DOCTOR, "--json", folder, "/dev/shm"))
    found = report.fault(
        "folders", "error", "/dev/shm: shared", "host2 does not see what host1 writes"
    )
    assert "same path" in found["remedy"]
    assert [
        one for one in report.findings("folders", "ok") if one["name"] == f"{folder}: shared"
    ], report.text
    assert set(report.json["hosts"]) == {"host1", "host2"}
    assert [one["name"] for one in report.findings("neighbours")] == [
        "within a host",
        "between hosts",
    ]
    (alike,) = report.findings("hosts", "ok")
    assert alike["found"].startswith("2 hosts of the same MPI library")
    (python_version,) = (one for one in report.findings("software") if one["name"] == "Python")
    assert python_version["hosts"] == ["host1", "host2"]


def test_a_pair_that_exchanges_no_message_is_told_and_not_waited_for(python, folder):
    script = folder / "silent.py"
    script.write_text(
        "from mpi4py import MPI\n"
        "from mpillm.errors import LaunchError\n"
        "from mpillm.doctor.checks.ring_links import measure\n"
        "comm = MPI.COMM_WORLD\n"
        "try:\n"
        "    if comm.rank == 0:\n"
        "        measure(comm, ['a', 'b'], patience=0.5)\n"
        "except LaunchError as failure:\n"
        "    print('caught:', failure, flush=True)\n"
        "    comm.Abort(7)\n"
        "comm.Barrier()\n"
    )
    done = python(script, ranks=2)
    assert done.returncode != 0
    assert "caught: no message passed between ranks 0 and 1 within 0.5 s" in done.stdout, (
        done.stderr
    )


def test_checks_of_ones_own_and_one_that_raises(doctor, folder):
    """Checks of a user's own: one that raises, and one whose messages work."""
    (folder / "mychecks.py").write_text(
        "from mpillm.doctor.check_base import Check\n"
        "from mpillm.doctor.findings import Finding\n"
        "class Broken(Check):\n"
        "    name, area = 'broken', 'mine'\n"
        "    def examine_host(self, host):\n"
        "        raise ZeroDivisionError('planted')\n"
        "class Count(Check):\n"
        "    name, area = 'count', 'mine'\n"
        "    def examine_ranks(self, world):\n"
        "        ranks = world.comm.allreduce(1)\n"
        "        return [Finding(self.area, self.name, 'ok', f'{ranks} ranks answer')]\n"
    )
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    mine = ["--check", "mychecks:Broken", "--check", "mychecks:Count"]
    profile = profile_of_another_cluster(folder / "profile.json")
    profile.write_text(json.dumps(json.loads(profile.read_text()) | {"version": 0}))
    report = doctor(*mine, "--profile", profile, ranks=2, PYTHONPATH=path)
    report.fault("cluster profile", "warning", "stale", "version 0")
    report.fault("mine", "error", "broken", "ZeroDivisionError: planted")
    assert [one["found"] for one in report.findings("mine", "ok")] == ["2 ranks answer"]
