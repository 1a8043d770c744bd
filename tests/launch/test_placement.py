import os
from dataclasses import replace
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.launch.placement import (
    COLUMNS,
    RankPlace,
    by_host,
    cores_within,
    narrow_binding,
    oversubscription,
    placement,
    table_rows,
)
from mpillm.launch.threads import allowance, fair_threads, threads_per_rank
from mpillm.machine.gpus import gpu_of, visible_gpus
from mpillm.machine.topology import (
    Topology,
    cpu_limit,
    job_cpus,
    parse_cpus,
    ranges_text,
    read_topology,
)


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def machine(root: Path, sockets: int = 2, cores: int = 2, threads: int = 2) -> Path:
    """Make a tree as in /sys: thread t of core c is CPU c + t × all cores, as on most x86."""
    total = sockets * cores
    files = {"sys/devices/system/cpu/online": f"0-{total * threads - 1}"}
    for core in range(total):
        siblings = ",".join(str(core + thread * total) for thread in range(threads))
        for thread in range(threads):
            folder = f"sys/devices/system/cpu/cpu{core + thread * total}/topology"
            files |= {
                f"{folder}/thread_siblings_list": siblings,
                f"{folder}/physical_package_id": str(core // cores),
            }
    for socket in range(sockets):
        ranges = [
            f"{socket * cores + t * total}-{(socket + 1) * cores - 1 + t * total}"
            for t in range(threads)
        ]
        files[f"sys/devices/system/node/node{socket}/cpulist"] = ",".join(ranges)
    return plant(root, files)


def test_lists_of_cpus_are_read_and_written() -> None:
    assert parse_cpus("0-3,8") == {0, 1, 2, 3, 8}
    assert parse_cpus("7\n") == {7}
    assert parse_cpus("") == set()
    assert ranges_text([8, 0, 1, 2, 3]) == "0–3,8"
    assert ranges_text([]) == ""
    for cpus in ({0}, {0, 1, 5, 6, 7, 9}, set(range(64))):
        assert parse_cpus(ranges_text(cpus).replace("–", "-")) == cpus


def test_hardware_threads_are_told_from_cores(tmp_path: Path) -> None:
    topology = read_topology(machine(tmp_path))
    assert topology.cores(range(8)) == {0, 1, 2, 3}
    assert topology.cores({1, 5}) == {1}
    assert topology.sockets({0, 4}) == {0}
    assert topology.sockets({1, 6}) == {0, 1}
    assert topology.numa_nodes({2, 3, 7}) == {1}


def test_a_machine_that_tells_nothing_has_a_core_for_each_cpu(tmp_path: Path) -> None:
    assert read_topology(tmp_path) == Topology()
    assert Topology().cores({3, 4}) == {3, 4}
    assert Topology().sockets({3}) == set()
    assert cpu_limit(tmp_path) == float("inf")
    assert job_cpus(tmp_path) == set()


def test_this_machine_is_read() -> None:
    topology, cpus = read_topology(), os.sched_getaffinity(0)
    assert 1 <= len(topology.cores(cpus)) <= len(cpus)
    assert cpus <= job_cpus()
    assert cpu_limit() > 0


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, float("inf")),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "150000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            },
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "0::/a",
                "sys/fs/cgroup/a/cpu.max": "max 100000",
                "sys/fs/cgroup/cpu.max": "400000 100000",
            },
            4,
        ),
        # Docker with version 1: the path is the host's, the container sees its own group on top.
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/0a1b\n1:name=systemd:/docker/0a1b",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            float("inf"),
        ),
        (
            {"proc/self/cgroup": "4:memory:/x", "sys/fs/cgroup/memory/x/cpu.max": "1 1"},
            float("inf"),
        ),
    ],
)
def test_the_limit_of_a_container_is_found(
    tmp_path: Path, files: dict[str, str], limit: float
) -> None:
    root = plant(tmp_path, files)
    assert cpu_limit(root) == limit
    assert allowance({}, root) == limit
    assert allowance({"SLURM_CPUS_ON_NODE": "3"}, root) == min(3, limit)


def test_the_cpus_of_a_job_are_those_of_its_set(tmp_path: Path) -> None:
    root = machine(tmp_path)
    assert job_cpus(root) == set(range(8))
    plant(
        root,
        {"proc/self/cgroup": "0::/job/step", "sys/fs/cgroup/job/cpuset.cpus.effective": "0-1,4-5"},
    )
    assert job_cpus(root) == {0, 1, 4, 5}
    plant(
        root,
        {
            "proc/self/cgroup": "3:cpuset:/job",
            "sys/fs/cgroup/cpuset/job/cpuset.effective_cpus": "2",
        },
    )
    assert job_cpus(root) == {2}


@pytest.mark.parametrize(
    ("masks", "limit", "threads"),
    [
        ([set(range(64))], 2, 2),
        ([set(range(64))] * 4, 8, 2),
        ([set(range(64))] * 4, 2, 1),
        ([set(range(64))] * 4, float("inf"), 16),
        ([{0, 1}], 64, 2),
        ([set(range(8))], 2.5, 2),
    ],
)
def test_a_limit_is_shared_by_the_ranks(masks: list[set[int]], limit: float, threads: int) -> None:
    assert fair_threads(masks, 0, limit) == threads


@pytest.mark.parametrize(
    ("limit", "cpus", "cores", "within"),
    [(float("inf"), 128, 64, 64), (8, 128, 64, 4), (8, 64, 64, 8), (0.5, 4, 4, 1), (1000, 4, 2, 2)],
)
def test_cores_of_an_allowance(limit: float, cpus: int, cores: int, within: int) -> None:
    assert cores_within(limit, cpus, cores) == within


def test_gpus_are_counted_and_hidden_ones_are_not(tmp_path: Path) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path) == []
    for number in range(4):
        (tmp_path / f"proc/driver/nvidia/gpus/0000:0{number}:00.0").mkdir(parents=True)
    assert visible_gpus({}, tmp_path) == ["cuda 0", "cuda 1", "cuda 2", "cuda 3"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 3"}, tmp_path) == ["cuda 2", "cuda 3"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-8f3b"}, tmp_path) == ["cuda GPU-8f3b"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1,-1,2"}, tmp_path) == ["cuda 1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, tmp_path) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3,4"}, tmp_path) == ["cuda 3"]


def test_a_container_and_amd_show_their_gpus_too(tmp_path: Path) -> None:
    plant(tmp_path / "nvidia", {"dev/nvidia0": "", "dev/nvidia1": "", "dev/nvidiactl": ""})
    assert visible_gpus({}, tmp_path / "nvidia") == ["cuda 0", "cuda 1"]
    nodes = "sys/class/kfd/kfd/topology/nodes"
    plant(
        tmp_path / "amd",
        {
            f"{nodes}/0/properties": "cpu_cores_count 64\nsimd_count 0",
            f"{nodes}/1/properties": "simd_count 416",
            f"{nodes}/2/properties": "cpu_cores_count 0\nsimd_count 416",
        },
    )
    assert visible_gpus({}, tmp_path / "amd") == ["rocm 0", "rocm 1"]
    assert visible_gpus({"ROCR_VISIBLE_DEVICES": "1"}, tmp_path / "amd") == ["rocm 1"]


def test_local_ranks_take_gpus_in_turn() -> None:
    assert [gpu_of(rank, ["cuda 0", "cuda 1"]) for rank in range(3)] == [
        "cuda 0",
        "cuda 1",
        "cuda 0",
    ]
    assert gpu_of(5, []) == ""


def places(host: str, masks: list[set[int]], first: int = 0, **settings: object) -> list[RankPlace]:
    """Make the places of one host's ranks, with a thread for each core unless `threads` is set."""
    return [
        replace(
            RankPlace(
                first + local,
                host,
                local,
                len(masks),
                frozenset(mask),
                frozenset(mask),
                len(mask),
                frozenset({0}),
            ),
            **(
                {"launcher": "mpirun (Open MPI)", "offered_cores": len(set().union(*masks))}
                | settings
            ),  # type: ignore[arg-type]
        )
        for local, mask in enumerate(masks)
    ]


def test_like_ranks_share_a_row_and_like_hosts_too() -> None:
    bound = [places(f"n{host}", [{0, 1}, {2, 3}], first=2 * host) for host in range(3)]
    rows = table_rows([place for host in bound for place in host])
    assert rows == [
        ("n0 and 2 alike", "0", "0", "0–1", "0", "–", "2", "–"),
        ("n0 and 2 alike", "1", "1", "2–3", "0", "–", "2", "–"),
    ]
    floating = places(
        "n3", [{0, 1, 2, 3}] * 4, first=6, threads=1, gpu="cuda 0", numa=frozenset({0, 1})
    )
    rows = table_rows([*bound[0], *floating])
    assert rows[2:] == [("n3", "6–9", "0–3", "0–3", "0", "0–1", "1", "cuda 0")]
    assert all(len(row) == len(COLUMNS) for row in rows)


def test_ranks_dealt_out_by_node_are_found_under_their_hosts() -> None:
    one, other = places("a", [{0}, {0}, {1}]), places("b", [{0}, {0}, {2}])
    dealt = [
        replace(place, rank=2 * place.local_rank + at)
        for at, host in enumerate((one, other))
        for place in host
    ]
    dealt.sort(key=lambda place: place.rank)
    assert [[place.rank for place in host] for host in by_host(dealt).values()] == [
        [0, 2, 4],
        [1, 3, 5],
    ]
    assert [row[:3] for row in table_rows(dealt)] == [
        ("a", "0,2", "0–1"),
        ("a", "4", "2"),
        ("b", "1,3", "0–1"),
        ("b", "5", "2"),
    ]


@pytest.mark.parametrize(
    "there",
    [
        places("n1", [{0, 1, 2, 3}] * 4, threads=1),
        places("n1", [{0}, {1}, {2, 3}]),
        places("n1", [{0, 1, 2}, {2, 3}], threads=2),
        places("n1", [set(range(64))], threads=2, limit=2.0),
        places("n1", [{0}], limit=0.5),
    ],
)
def test_ranks_that_fit_are_left_in_peace(there: list[RankPlace]) -> None:
    assert oversubscription(there) == ""


@pytest.mark.parametrize(
    ("there", "words", "missing"),
    [
        (
            places("n1", [{0, 1}] * 4, threads=1),
            [
                "ranks 0–3 of the job run 4 threads on 2 CPUs (0–1)",
                "start at most 2 ranks there",
            ],
            ["OMP_NUM_THREADS", "--bind-to"],
        ),
        (
            places("n1", [{0, 1, 2, 3}] * 2, threads=4),
            ["run 8 threads on 4 CPUs (0–3)", "set OMP_NUM_THREADS=2"],
            ["at most", "--bind-to"],
        ),
        (
            places("n1", [{0}, {0}, {1, 2, 3}], threads=1, offered_cores=6),
            [
                "ranks 0–1 of the job run 2 threads on 1 CPU (0)",
                "slot:PE=2 or start at most 1 rank there",
            ],
            ["OMP_NUM_THREADS"],
        ),
        (
            places("n1", [set(range(64))], threads=64, limit=2.0),
            ["rank 0 of the job run 64 threads on 2 CPUs' worth of time", "set OMP_NUM_THREADS=2"],
            ["at most"],
        ),
    ],
)
def test_crowded_ranks_are_told_where_and_what_to_do(
    there: list[RankPlace], words: list[str], missing: list[str]
) -> None:
    said = oversubscription(there)
    assert said.startswith("host n1: ")
    assert [word for word in words if word not in said] == [], said
    assert [word for word in missing if word in said] == [], said


def test_the_worst_of_many_hosts_is_named() -> None:
    said = oversubscription(
        [*places("a", [{0}] * 2), *places("b", [{0}] * 4, first=2), *places("c", [{0}], first=6)]
    )
    assert said.startswith(
        "host b (and 1 host more like it): ranks 2–5 of the job run 4 threads on 1 CPU (0)"
    )


def test_idle_cores_are_noticed() -> None:
    said = narrow_binding(places("n1", [{0}, {1}], offered_cores=64))
    assert said == (
        "2 ranks on host n1 may run on 2 of its 64 cores; "
        "start with --bind-to none or --map-by slot:PE=32"
    )
    said = narrow_binding(
        [
            *places("n1", [{0}], offered_cores=2),
            *places("n2", [{0}], offered_cores=8, launcher="srun"),
        ]
    )
    assert said.startswith(
        "1 rank on host n2 (and 1 host more like it) may run on 1 of its 8 cores; "
    )
    assert "--cpus-per-task=8" in said
    assert "taskset" in narrow_binding(places("n1", [{0}], offered_cores=4, launcher=""))


@pytest.mark.parametrize(
    "there",
    [
        places("n1", [{0, 1, 2}], offered_cores=4),
        places("n1", [{0}, {1}, {2}], offered_cores=4),
        places("n1", [set(range(64))], offered_cores=2),
        places("n1", [{0}], offered_cores=1),
    ],
)
def test_a_good_use_of_the_cores_needs_no_hint(there: list[RankPlace]) -> None:
    assert narrow_binding(there) == ""


def test_every_rank_learns_the_place_of_all(comm: MPI.Intracomm) -> None:
    found = placement(comm, {}, threads_per_rank(comm, {}))
    assert [place.rank for place in found] == list(range(comm.size))
    mine = found[comm.rank]
    assert mine.host == MPI.Get_processor_name()
    assert mine.cpus == os.sched_getaffinity(0)
    assert mine.cores == read_topology().cores(mine.cpus)
    assert mine.threads == threads_per_rank(comm, {})
    assert mine.offered_cores >= 1
    for there in by_host(found).values():
        assert sorted(place.local_rank for place in there) == list(range(there[0].local_size))
    assert comm.bcast(found) == found
    assert sum(len(parse_cpus(row[1].replace("–", "-"))) for row in table_rows(found)) <= comm.size


def test_the_users_threads_are_told_and_crowds_noticed(comm: MPI.Intracomm) -> None:
    many = {"OMP_NUM_THREADS": "1000"}
    found = placement(comm, many, threads_per_rank(comm, many))
    assert {place.threads for place in found} == {1000}
    assert "OMP_NUM_THREADS=" in oversubscription(found)


@pytest.mark.usefixtures("processes")
def test_places_under_mpirun(python, folder: Path) -> None:  # type: ignore[no-untyped-def]
    script = folder / "places.py"
    script.write_text(
        "import os\nfrom mpi4py import MPI\n"
        "from mpillm.launch.placement import placement, table_rows\n"
        "from mpillm.launch.threads import threads_per_rank\n"
        "comm = MPI.COMM_WORLD\n"
        "places = placement(comm, os.environ, threads_per_rank(comm, os.environ))\n"
        "if comm.rank == 0:\n"
        "    print([place.local_rank for place in places], places[0].launcher)\n"
    )
    done = python(script, ranks=3)
    assert done.stdout.startswith("[0, 1, 2] mpirun ("), done.stdout + done.stderr
