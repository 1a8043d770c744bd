"""The doctor's judgements, on plain values and on small trees of files as in /sys and /proc."""

import errno
import io
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.doctor.check_base import Check
from mpillm.doctor.check_catalog import CHECKS
from mpillm.doctor.checks import (
    cuda_aware,
    dev_shm,
    folders,
    found_schedulers,
    gpu_count,
    homogeneous,
    host_cores,
    host_memory,
    infiniband,
    interfaces,
    loaded_mpi,
    mpirun,
    process_limits,
    profile_match,
    reach,
    ring_links,
    shared_folder,
    site_file,
    software,
)
from mpillm.doctor.diagnose import load_checks
from mpillm.doctor.findings import Finding, FindingRow, guarded, hosts_text, merge, ranged, worst
from mpillm.doctor.findings_report import print_findings, report_lines, summary
from mpillm.doctor.mpi_look import MpiLook, look_of
from mpillm.doctor.subprocesses import Ended
from mpillm.errors import UsageError
from mpillm.launch.current_job import job_hosts
from mpillm.launch.schedulers.lsf import LSF
from mpillm.launch.schedulers.pbs import PBS
from mpillm.launch.schedulers.slurm import SLURM
from mpillm.machine.cluster_profile import Cluster, ClusterProfile
from mpillm.machine.mpi_names import MpiName, named
from mpillm.machine.topology import Topology
from mpillm.system.console import Console
from mpillm.system.environment import without_launcher

GIB, MIB = 1 << 30, 1 << 20


def test_equal_findings_of_hosts_become_one_with_their_numbers_ranged():
    def found(free, verdict="ok"):
        return Finding("host", "memory", verdict, f"{free} GiB free of 64 GiB", "")

    rows = merge(
        {"n1": [found(40)], "n2": [found(9)], "n3": [found(1, "warning")], "n4": [found(31.5)]}
    )
    assert rows == [
        FindingRow(Finding("host", "memory", "ok", "9–40 GiB free of 64 GiB"), ("n1", "n2", "n4")),
        FindingRow(Finding("host", "memory", "warning", "1 GiB free of 64 GiB"), ("n3",)),
    ]
    assert worst(rows) == "warning"
    assert worst([]) == "ok"


def test_texts_without_numbers_stay_as_they_are():
    assert ranged(["none", "none"]) == "none"
    assert ranged(["1,024 of 5", "99 of 5"]) == "99–1,024 of 5"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["n1", "n2", "n3", "n7"], "n1–n3, n7"),
        (["n09", "n10"], "n09–n10"),
        (["gpu1-a", "gpu2-a"], "gpu1-a–gpu2-a"),
        (["b", "a"], "b, a"),
        ([f"x{2 * n}" for n in range(9)], "x0, x2, x4, x6, x8, x10 and 3 more"),
        ([], ""),
    ],
)
def test_hosts_in_few_words(names, text):
    assert hosts_text(names) == text


def test_a_check_that_raises_is_an_error_finding():
    (found,) = guarded("host", "memory", lambda: [1 / 0])
    assert (found.verdict, found.name) == ("error", "memory")
    assert "ZeroDivisionError" in found.found
    assert found.remedy


@pytest.mark.parametrize(
    ("says", "library"),
    [
        ("mpirun (Open MPI) 5.0.11\n", "Open MPI 5.0.11"),
        ("Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4\0", "Open MPI 4.1.4"),
        (
            "HYDRA build details:\n    Version:                                 5.0.2\n",
            "MPICH 5.0.2",
        ),
        ("MPICH Version:      4.2.1\nMPICH Release date: …", "MPICH 4.2.1"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005", "Intel MPI 2021.11"),
        ("Intel(R) MPI Library 2021.11 for Linux* OS\n", "Intel MPI 2021.11"),
        ("MVAPICH2 Version      :\t2.3.7", "MVAPICH 2.3.7"),
        ("MPI VERSION    : CRAY MPICH version 8.1.25.17 (ANL base 3.4a2)", "Cray MPICH 8.1.25.17"),
        ("Some MPI 7\nmore", "Some MPI 7"),
        ("", "unknown"),
    ],
)
def test_what_mpi_libraries_and_launchers_call_themselves(says, library):
    assert named(says).text == library


@pytest.mark.parametrize(
    ("says", "started", "verdict"),
    [
        ("HYDRA build details:\n Version: 4.2", False, "error"),
        ("HYDRA build details:\n Version: 4.2", True, "warning"),
        ("mpirun (Open MPI) 4.1.4", False, "warning"),
        ("mpirun (Open MPI) 5.0.1", False, "ok"),
        ("something else", False, "ok"),
    ],
)
def test_mpirun_and_library_agree(says, started, verdict):
    look = MpiLook(MpiName("Open MPI", "5.0.11"), mpirun="/opt/mpi/bin/mpirun")
    found = mpirun.judge_mpirun(look, mpirun.Mpirun("/usr/bin/mpirun", named(says)), False, started)
    assert found.verdict == verdict
    assert verdict == "ok" or "/opt/mpi/bin/mpirun" in found.remedy


def test_hydra_starts_its_family():
    look = MpiLook(MpiName("Intel MPI", "2021.11"))
    assert (
        mpirun.judge_mpirun(
            look,
            mpirun.Mpirun("/usr/bin/mpirun", MpiName("MPICH", "4.2")),
            False,
            False,
        ).verdict
        == "ok"
    )


def test_without_mpirun_ranks_are_the_batch_systems_to_start():
    assert mpirun.judge_mpirun(MpiLook(), mpirun.Mpirun(), False, False).verdict == "warning"
    assert mpirun.judge_mpirun(MpiLook(), mpirun.Mpirun(), True, False).verdict == "ok"


def test_an_mpi_that_does_not_start_is_told_with_its_signal_and_its_words():
    library = '{"mpi4py": "4.1", "library": "MPICH Version: 5.0", "files": ""}\n'
    for code, word in (
        (-7, "was killed by SIGBUS"),
        (None, "did not end in time"),
        (15, "left with code 15: no pmi"),
    ):
        found = loaded_mpi.judge_library(look_of(Ended(code, library, "---\nno pmi\n")))
        assert [one.verdict for one in found] == ["ok", "error"]
        assert word in found[1].found
        assert found[1].remedy
    (missing,) = loaded_mpi.judge_library(
        look_of(Ended(1, "", "Traceback …\n  line\nRuntimeError: cannot load MPI library\n"))
    )
    assert "RuntimeError: cannot load MPI library" in missing.found
    good = loaded_mpi.judge_library(look_of(Ended(0, library + '{"thread_level": 3}\n')))
    assert [one.verdict for one in good] == ["ok", "ok"]
    assert loaded_mpi.judge_threads(1).verdict == "warning"


def test_needs_come_from_metadata_lines():
    lines = [
        "h5py>=3.10",
        "torch >= 2.5 ; python_version > '3'",
        "mpich>=4.2; extra == 'mpich'",
        "rich",
        "tensorboard>=2.10; extra == 'train'",
    ]
    assert software.needs_of(lines) == (
        software.Need("h5py", "3.10"),
        software.Need("torch", "2.5", optional=True),
        software.Need("rich", ""),
        software.Need("tensorboard", "2.10", optional=True),
    )
    python, needs = software.requirements()
    assert python == "3.11"
    assert {"h5py", "mpi4py", "torch"} <= {need.name for need in needs}


@pytest.mark.parametrize(
    ("version", "lowest", "older"),
    [
        ("3.9", "3.10", True),
        ("3.10.0", "3.10", False),
        ("2.13.0+cpu", "2.5", False),
        ("1.0rc1", "1.0", False),
    ],
)
def test_versions_are_compared_by_their_numbers(version, lowest, older):
    assert software.older(version, lowest) is older


def test_packages_too_old_and_missing():
    needs = (
        software.Need("h5py", "3.10"),
        software.Need("torch", "2.5", optional=True),
        software.Need("rich", ""),
        software.Need("numpy", "2"),
    )
    found = software.judge_packages(
        needs, {"h5py": "3.9", "torch": "not installed", "rich": "15.0", "numpy": "not installed"}
    )
    assert [one.verdict for one in found] == ["ok", "error", "ok", "error"]
    assert found[1].remedy == "pip install --upgrade 'h5py>=3.10'"
    assert found[2].found.startswith("not installed; `mpillm train`")
    assert found[2].remedy == "pip install 'mpillm[train]'"
    assert found[3].remedy == "pip install 'numpy>=2'"
    assert software.judge_python("3.9.1", "3.11").verdict == "error"


def test_a_module_that_takes_its_process_down_is_named_and_the_next_still_tried(tmp_path):
    (tmp_path / "crashing.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
    )
    found = software.try_imports(
        ["json", "crashing", "absent", "math"], {"PYTHONPATH": str(tmp_path)}
    )
    assert found["json"].failure == found["math"].failure == ""
    assert found["crashing"].failure == "the process was killed by SIGILL"
    assert found["absent"].failure.startswith("ModuleNotFoundError")
    kernel = software.judge_kernel(found["crashing"])
    assert kernel.verdict == "error"
    assert "build it on this machine" in kernel.remedy


def test_packages_without_metadata_are_tried(monkeypatch):
    """As where mpillm's files were copied: nothing says what it needs."""
    monkeypatch.setattr(software, "requirements", lambda: ("", ()))
    monkeypatch.setattr(software, "package_version", lambda name: software.MISSING)
    monkeypatch.setattr(software, "IMPORTED", ("numpy", "absent"))
    monkeypatch.setattr(
        software,
        "try_imports",
        lambda names, environment: {name: software.Imported("broken") for name in names},
    )
    found = software.read_software({})
    assert list(found.imports) == ["numpy", software.KERNEL]
    (numpy,) = (one for one in software.judge_software(found) if one.name == "numpy")
    assert numpy.found == "numpy (no metadata) does not load: broken"


def test_builds_of_torch():
    assert gpu_count.build_of({"cuda": "12.8", "hip": ""}) == "CUDA 12.8"
    assert gpu_count.build_of({"cuda": "", "hip": "6.2"}) == "ROCm 6.2"
    assert gpu_count.build_of({}) == "CPU"


FOUR_CORES = Topology({cpu: cpu % 4 for cpu in range(8)}, dict.fromkeys(range(8), 0), {})


@pytest.mark.parametrize(
    ("masks", "allowed", "threads", "verdict"),
    [
        ([{0}] * 4, math.inf, None, "error"),
        ([{0, 1}] * 4, math.inf, None, "warning"),
        ([{0, 1, 2, 3}] * 4, math.inf, None, "ok"),
        ([{0, 4}] * 2, math.inf, None, "warning"),
        ([{0, 1, 2, 3}] * 4, 1.0, None, "error"),
        ([{0, 1, 2, 3}] * 2, math.inf, 4, "warning"),
        ([{0, 1, 2, 3}] * 2, math.inf, 2, "ok"),
        ([{0}], math.inf, None, "ok"),
    ],
)
def test_ranks_want_cores(masks, allowed, threads, verdict):
    found = host_cores.judge_cores(host_cores.cores_of(masks, FOUR_CORES, allowed, threads))
    assert found.verdict == verdict, found
    assert bool(found.remedy) == (verdict != "ok")


@pytest.mark.parametrize(
    ("total", "free", "ranks", "verdict"),
    [
        (0, 0, 1, "error"),
        (MIB, MIB, 1, "error"),
        (64 * MIB, 64 * MIB, 1, "ok"),
        (64 * MIB, 64 * MIB, 2, "warning"),
        (GIB, 2 * MIB, 1, "error"),
        (GIB, GIB, 4, "ok"),
    ],
)
def test_shared_memory(total, free, ranks, verdict):
    found = dev_shm.judge_shared(dev_shm.SharedMemory(total, free), ranks)
    assert found.verdict == verdict, found
    assert bool(found.remedy) == (verdict != "ok")


def test_limits():
    few = process_limits.judge_limits(
        process_limits.ProcessLimits(256, 64 * 1024), 2, infiniband=True
    )
    assert [one.verdict for one in few] == ["warning", "error"]
    assert "ulimit -n" in few[0].remedy
    assert "ulimit -l unlimited" in few[1].remedy
    assert [
        one.verdict
        for one in process_limits.judge_limits(
            process_limits.ProcessLimits(1024, 64), 2, infiniband=False
        )
    ] == ["ok"]
    assert (
        process_limits.judge_limits(process_limits.ProcessLimits(1024, -1), 5000, infiniband=True)[
            0
        ].verdict
        == "warning"
    )
    assert process_limits.judge_locked(process_limits.UNLIMITED).verdict == "ok"


def test_memory_and_its_control_group(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  8388608 kB\nMemAvailable:  6291456 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    group = tmp_path / "sys/fs/cgroup/job/step"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert host_memory.read_memory(tmp_path) == host_memory.HostMemory(8 * GIB, 8 * GIB, 6 * GIB)
    (group.parent / "memory.max").write_text(f"{2 * GIB}\n")
    memory = host_memory.read_memory(tmp_path)
    assert memory.limit == 2 * GIB
    assert host_memory.judge_memory(memory, 2).verdict == "ok"
    crowded = host_memory.judge_memory(memory, 3)
    assert crowded.verdict == "warning"
    assert "control group" in crowded.found
    # What the group holds is gone, but for the cache of files.
    (group.parent / "memory.current").write_text(f"{GIB * 3 // 2}\n")
    assert host_memory.read_memory(tmp_path).usable == GIB // 2
    (group.parent / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert host_memory.read_memory(tmp_path).usable == GIB * 3 // 2
    (group.parent / "memory.current").write_text(f"{4 * GIB}\n")
    assert host_memory.read_memory(tmp_path).usable == 1


def card(folder, name, **ports):
    for number, (state, rate) in enumerate(ports.values(), 1):
        port = folder / name / "ports" / str(number)
        port.mkdir(parents=True)
        (port / "state").write_text(f"4: {state}\n")
        (port / "rate").write_text(f"{rate}\n")


@pytest.mark.parametrize(
    ("states", "verdict", "word"),
    [
        (["ACTIVE"], "ok", "100 Gb/sec"),
        (["ACTIVE", "DOWN"], "ok", "DOWN"),
        (["DOWN"], "error", "none is active"),
        (["INIT"], "error", "none is active"),
        (["ACTIVE", "INIT"], "warning", "INIT"),
    ],
)
def test_infiniband_ports(tmp_path, states, verdict, word):
    card(
        tmp_path,
        "mlx5_0",
        **{f"p{number}": (state, "100 Gb/sec (4X EDR)") for number, state in enumerate(states)},
    )
    found = infiniband.judge_ports(infiniband.read_ports(tmp_path))
    assert found.verdict == verdict
    assert word in found.found
    assert ("subnet manager" in found.remedy) == ("INIT" in states)


def test_interfaces(tmp_path):
    for name, state, speed in (
        ("lo", "unknown", ""),
        ("ib0", "up", "200000"),
        ("eth1", "down", "-1"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "operstate").write_text(state + "\n")
        (tmp_path / name / "speed").write_text(speed + "\n")
    (tmp_path / "eth1/device").mkdir()
    found = interfaces.judge_interfaces(interfaces.read_interfaces(tmp_path), 2)
    assert (found.verdict, found.found) == ("ok", "eth1 down, ib0 200 Gb/s")
    assert interfaces.judge_interfaces((), 2).verdict == "warning"
    assert interfaces.judge_interfaces((), 1).verdict == "ok"
    assert interfaces.read_interfaces(tmp_path / "none") == ()


@pytest.mark.parametrize(
    ("names", "visible", "wanted", "build", "verdict", "word"),
    [
        (["A"] * 4, 4, 4, "CUDA 12.8", "ok", "4 × A"),
        (["A"] * 3, 3, 4, "CUDA 12.8", "error", "3 × A, where 4 should be by the site file"),
        ([], 2, None, "CPU", "warning", "can use 0 of 2 GPUs"),
        ([], 0, None, "CPU", "ok", "none"),
        (["A"], 1, 0, "CUDA 12.8", "error", "where 0 should be"),
        ([], 2, None, "", "ok", "2 visible; torch is not installed"),
        ([], 2, 4, "", "error", "where 4 should be"),
        ([], 0, None, "", "ok", "none"),
    ],
)
def test_gpus(names, visible, wanted, build, verdict, word):
    devices = [f"cuda {number}" for number in range(visible)]
    found = gpu_count.judge_gpus(names, devices, wanted, build, "the site file")
    assert found.verdict == verdict
    assert word in found.found
    assert ("install torch" in found.remedy) == (build == "CPU" and visible > 0)


def test_cuda_awareness_is_told():
    assert cuda_aware.judge_aware({"messages": True, "allreduce": True}).verdict == "ok"
    assert (
        "through the host: allreduce"
        in cuda_aware.judge_aware({"messages": True, "allreduce": False}).found
    )
    assert cuda_aware.judge_aware({"messages": False, "allreduce": False}).verdict == "warning"


@pytest.mark.parametrize("number", [*folders.FAILURES, errno.ENOSPC, errno.EIO])
def test_each_failure_of_a_folder_has_a_way_out(number):
    (found,) = folders.judge_folder(
        folders.TriedFolder("/x", "nfs4", GIB, 0, None, (number, "write")), {}
    )
    assert found.verdict == "error"
    assert found.remedy
    assert "{" not in found.found + found.remedy


def test_a_folder_that_hangs_is_slow_or_short_of_room():
    (hung,) = folders.judge_folder(folders.TriedFolder("/x", "nfs4", hung=30), {})
    assert "no answer from its file system (nfs4) within 30 s" in hung.found
    slow = folders.TriedFolder(
        "/x", "lustre", GIB, MIB, None, None, 0, 8.0, 0.1, {"flock": "ENOSYS", "fcntl": "kept"}, 1
    )
    room, rate, locks, stripes = folders.judge_folder(slow, {})
    assert [one.verdict for one in (room, rate, locks, stripes)] == ["warning"] * 4
    assert "1 MB/s" in rate.found
    assert "flock fails with ENOSYS" in locks.found
    assert "HDF5_USE_FILE_LOCKING=FALSE" in locks.remedy
    assert "lfs setstripe -c 4 /x" in stripes.remedy
    assert folders.judge_locks(slow, {"HDF5_USE_FILE_LOCKING": "FALSE"}).verdict == "ok"
    assert (
        "not kept"
        in folders.judge_locks(
            folders.TriedFolder("/x", locks={"fcntl": "granted twice"}), {}
        ).found
    )
    assert folders.judge_stripes(folders.TriedFolder("/x", stripes=-1)).verdict == "ok"


def test_a_folder_that_some_hosts_do_not_share():
    seen = {"n1": True, "n2": False, "n3": False}
    found = shared_folder.judge_sharing("/data", seen, asked=True)
    assert found
    assert found.verdict == "error"
    assert "n2–n3 do not see what n1 writes" in found.found
    assert shared_folder.judge_sharing("/data", seen, asked=False).verdict == "warning"
    assert (
        shared_folder.judge_sharing("/data", {"n1": True, "n2": True}, asked=True).verdict == "ok"
    )
    assert shared_folder.judge_sharing("/data", {}, asked=True) is None


def test_hosts_by_what_came_of_them():
    results = {
        "n1": reach.ANSWERS,
        "n2": reach.ANSWERS,
        "n3": reach.REFUSED,
        "n4": reach.NO_NAME,
        "n5": reach.NO_ANSWER,
    }
    found = {one.name: one for one in reach.judge_hosts(results, "")}
    assert {name: one.verdict for name, one in found.items()} == {
        "n1–n2": "ok",
        "n3": "warning",
        "n4": "error",
        "n5": "error",
    }
    assert "getent hosts n4" in found["n4"].remedy
    assert "within 2 s" in found["n5"].found
    assert reach.judge_hosts({"n3": reach.REFUSED}, "srun")[0].verdict == "ok"
    assert reach.try_hosts(["here.cluster"], "here") == {"here.cluster": "this host"}


def test_the_hosts_of_an_allocation(tmp_path):
    file = tmp_path / "nodes"
    file.write_text("n1 slots=2\nn1\nn2\n\n")
    assert job_hosts({"PBS_NODEFILE": str(file)}) == (["n1", "n2"], PBS)
    assert job_hosts({"LSB_DJOB_HOSTFILE": str(file)}) == (["n1", "n2"], LSF)
    assert job_hosts({"SLURM_JOB_NODELIST": "n1,n2", "PATH": ""}) == (["n1", "n2"], SLURM)
    assert job_hosts({"SLURM_JOB_NODELIST": "n[1-2]", "PATH": ""}) == ([], SLURM)
    assert job_hosts({}) == ([], None)
    assert [system.ranks_need_ssh for system in (SLURM, PBS, LSF)] == [False, True, True]


def test_the_odd_host_is_named():
    hosts = {f"n{number}": {"Linux": "6.1", "cores": "64"} for number in range(1, 5)}
    assert homogeneous.judge_alike(hosts)[0].verdict == "ok"
    assert homogeneous.judge_alike({"n1": {"Linux": "6.1"}}) == []
    hosts["n3"] = {"Linux": "5.14", "cores": "64"}
    (found,) = homogeneous.judge_alike(hosts)
    assert (found.verdict, found.found) == ("warning", "n3 has 5.14, the other 3 have 6.1")
    (tie,) = homogeneous.judge_alike({"n1": {"torch": "2.5"}, "n2": {"torch": "2.6"}})
    assert tie.found == "n1 has 2.5; n2 has 2.6"


@given(st.integers(2, 70))
def test_each_pair_of_the_ring_once_and_each_rank_once_a_round(ranks):
    rounds = ring_links.ring_rounds(ranks)
    assert len(rounds) <= 3
    for pairs in rounds:
        busy = [rank for pair in pairs for rank in pair]
        assert len(busy) == len(set(busy))
    ring = {frozenset((rank, (rank + 1) % ranks)) for rank in range(ranks)}
    assert sorted(map(sorted, ring)) == sorted(sorted(pair) for pairs in rounds for pair in pairs)


def pair(first, latency=2e-6, rate=1e10, hosts=("n1", "n2")):
    return ring_links.LinkPair(first, first + 1, hosts, latency, rate)


def test_a_pair_far_behind_its_like_is_named():
    pairs = [*(pair(first) for first in range(5)), pair(5, rate=1e9, hosts=("n6", "n7"))]
    (found,) = ring_links.judge_neighbours(pairs, crowded=False)
    assert found.verdict == "warning"
    assert "ranks 5 and 6 (n6 and n7) 1.00 GB/s" in found.found
    assert "median 2.0 µs, 10.00 GB/s" in found.found
    assert ring_links.judge_neighbours(pairs, crowded=True)[0].verdict == "ok"
    late = [*pairs[:5], pair(5, latency=1e-3)]
    assert "1,000.0 µs" in ring_links.judge_neighbours(late, crowded=False)[0].found
    assert ring_links.judge_neighbours(pairs[4:], crowded=False)[0].verdict == "ok", (
        "two pairs have no median"
    )
    mixed = ring_links.judge_neighbours([pair(0, hosts=("n1", "n1")), *pairs[1:5]], crowded=False)
    assert [one.name for one in mixed] == ["within a host", "between hosts"]


def test_profiles(tmp_path):
    here = Cluster("Fast 1", 8, "Open MPI", "5.0", 1, 8)
    path = tmp_path / "p.json"
    missing = profile_match.judge_profile(path, here)
    assert (missing.verdict, missing.name) == ("error", "unusable")
    assert missing.found == f"there is no profile {path}"
    assert missing.remedy.startswith("make one with `mpirun")
    ClusterProfile("2026-01-01T00:00:00Z", here).save(path)
    assert profile_match.judge_profile(path, here).verdict == "ok"
    stale = profile_match.judge_profile(path, Cluster("Slow 2", 8, "Open MPI", "5.0", 1, 8))
    assert (stale.verdict, stale.name) == ("warning", "stale")
    assert "another cluster (processor 'Fast 1', not 'Slow 2')" in stale.found
    assert stale.remedy == missing.remedy


def test_sites_and_batch_systems(tmp_path):
    assert found_schedulers.judge_systems({}, None).verdict == "ok"
    path = tmp_path / "site.toml"
    path.write_text("colour = 'blue'\n")
    broken = site_file.judge_site(site_file.read_site(None, {"MPILLM_SITE": str(path)}))
    assert (broken.verdict, "colour" in broken.found) == ("error", True)
    assert broken.remedy == f"correct {path}; jobs/sites has examples"
    path.write_text("gpus_per_node = 4\n")
    reading = site_file.read_site(path, {})
    assert (reading.site.gpus_per_node, site_file.judge_site(reading).verdict) == (4, "ok")
    none = site_file.judge_site(site_file.read_site(None, {"HOME": str(tmp_path)}))
    assert none.found.startswith("none, or an empty one")
    reading = site_file.SiteReading(failure="No module named 'pydantic'", package_missing=True)
    assert site_file.judge_site(reading).verdict == "warning"


class OwnCheck(Check):
    """A check of a user's own, named as a plug-in."""

    name, area = "own", "mine"


def test_the_catalogue_and_a_check_of_ones_own():
    checks = load_checks([f"{__name__}:OwnCheck"])
    assert len(checks) == len(CHECKS) + 1
    assert checks[-1].examine_job(None) == ()
    places = [(check.area, check.name) for check in checks]
    assert len(set(places)) == len(places)
    with pytest.raises(UsageError, match="no check is called 'memroy', did you mean memory"):
        load_checks(["memroy"])


def test_a_process_in_no_job_keeps_the_users_settings():
    environment = {"PMI_RANK": "1", "SLURM_PROCID": "0", "OMPI_MCA_pml": "ob1", "PATH": "/bin"}
    assert without_launcher(environment) == {"OMPI_MCA_pml": "ob1", "PATH": "/bin"}


ROWS = [
    FindingRow(
        Finding("host", "cores", "error", "4 ranks on 1 core", "ask for a core a rank, " * 12),
        ("n1", "n2"),
    ),
    FindingRow(Finding("software", "Python", "ok", "3.11"), ("n1", "n2", "n3")),
    FindingRow(
        Finding(
            "folders",
            "/a/long/path/to/a/folder: speed",
            "warning",
            "writes 1 MB/s",
            "choose another",
        )
    ),
]


def test_the_report_groups_by_area_names_hosts_and_fits():
    text = ["".join(part for part, _ in line) for line in report_lines(ROWS, ["n1", "n2", "n3"])]
    assert [line for line in text if not line.startswith(" ")] == [
        "software",
        "host",
        "folders",
        "doctor: 1 error, 1 warning, 1 ok",
    ]
    assert max(map(len, text)) <= 100
    assert any("n1–n2: 4 ranks on 1 core" in line for line in text)
    assert not any("n1–n3" in line for line in text), "what is true of all names none"
    assert summary([]) == "doctor: 0 errors, 0 warnings, 0 ok"


@pytest.mark.parametrize("as_json", [True, False])
def test_the_exit_code_is_of_errors_alone(as_json, capsys):
    assert print_findings(ROWS, {"n1": {}}, as_json, Console()) == 1
    assert print_findings(ROWS[1:], {"n1": {}}, as_json, Console()) == 0
    assert print_findings(ROWS, {"n1": {}}, as_json, Console(speaks=False)) == 1


def test_a_hidden_package_is_named_and_nothing_is_installed_again() -> None:
    """A package that needs the hidden one fails too: installing it again would not help."""
    found = software.judge_software(
        software.Software(
            "3.12.1",
            "",
            (),
            {"mpillm": "1.0", "h5py": "3.16.0"},
            {"h5py": software.Imported("AttributeError: module 'numpy' has no attribute")},
            {"numpy": Path("/here/numpy.py")},
        )
    )
    bad = [finding for finding in found if finding.verdict == "error"]
    assert [finding.name for finding in bad] == ["numpy"]
    assert bad[0].found == "/here/numpy.py hides the installed numpy"
    assert bad[0].remedy == "rename it, or unset PYTHONPATH"


@pytest.mark.parametrize("name", ["numpy:float64", "os:getcwd", "json:absent"])
def test_a_check_that_is_none(name: str) -> None:
    with pytest.raises(UsageError, match=f"the check {name}"):
        load_checks([name])


@pytest.mark.parametrize("as_json", [True, False])
def test_what_other_programs_print_rules_no_terminal(as_json: bool) -> None:
    out = io.StringIO()
    row = FindingRow(Finding("MPI", "mpirun\x1b[31m", "error", "\x1b[2Jno\ud800", "\x07do"), ())
    print_findings([row], {"host\x1b": {"a": "\x9b"}}, as_json, Console(stream=out))
    assert not set("\x1b\x07\x9b\ud800") & set(out.getvalue())
    out.getvalue().encode("utf-8")
