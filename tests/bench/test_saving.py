"""The files of bench: tried first, never in the way of the figures, and no profile lost."""

import shutil
import threading
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from mpillm.bench.bench_options import BenchOptions
from mpillm.bench.make_profile import SavedProfile
from mpillm.bench.run import run_benchmarks
from mpillm.bench.sample_arrays import needed_bytes
from mpillm.errors import UsageError
from mpillm.machine.cluster_profile import Cluster, ClusterProfile, load_profile
from mpillm.system.console import Console

HERE = Cluster("Made Up 9000", 64, "Open MPI", "5.0.9", 2, 4)
QUICK = BenchOptions("gemm", sizes="16", iterations=1, warmup=0)


def profile(made: str) -> ClusterProfile:
    return ClusterProfile(made, HERE)


def made_of(path: Path) -> str:
    found = load_profile(path, print, HERE)
    assert found is not None
    return found.made


def test_of_two_runs_at_once_neither_loses_its_profile(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    first, second, third = (SavedProfile.find(path) for _ in range(3))
    assert first.write(profile("1")) == path
    assert second.write(profile("2")) == tmp_path / "cluster-2.json"
    assert third.write(profile("3")) == tmp_path / "cluster-3.json"
    assert [made_of(tmp_path / f"cluster{end}.json") for end in ("", "-2", "-3")] == ["1", "2", "3"]
    # A later run replaces the file, as one that is asked to.
    assert SavedProfile.find(path).write(profile("4")) == path
    assert made_of(path) == "4"


def test_many_at_the_same_moment(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_text("before")
    runs = [SavedProfile.find(path) for _ in range(8)]
    at_once = [
        threading.Thread(target=run.write, args=(profile(str(number)),))
        for number, run in enumerate(runs)
    ]
    for thread in at_once:
        thread.start()
    for thread in at_once:
        thread.join()
    assert sorted(made_of(file) for file in tmp_path.iterdir()) == list("01234567")


def test_a_device_and_a_link(tmp_path: Path) -> None:
    assert SavedProfile.find(Path("/dev/null")).write(profile("1")) == Path("/dev/null")
    assert Path("/dev/null").is_char_device()
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    SavedProfile.find(tmp_path / "link.json").write(profile("1"))
    assert (tmp_path / "link.json").is_symlink()
    assert made_of(tmp_path / "target.json") == "1"


@pytest.mark.parametrize("option", ["csv", "save", "plot"])
def test_a_place_that_is_lost_meanwhile_does_not_take_the_figures(
    comm: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """The folder is removed while bench measures."""
    place = folder / "gone" / "file.png"
    options = replace(QUICK, what="memory", **{option: place})
    real = run_benchmarks.__globals__["print_sections"]
    seen = list[int]()

    def measured_then_removed(*given: Any) -> Any:
        comm.Barrier()
        if comm.rank == 0:
            shutil.rmtree(folder / "gone", ignore_errors=True)
        comm.Barrier()
        return measure(*given)

    measure = run_benchmarks.__globals__["_measure"]
    monkeypatch.setitem(run_benchmarks.__globals__, "_measure", measured_then_removed)
    monkeypatch.setitem(
        run_benchmarks.__globals__,
        "print_sections",
        lambda *given: (seen.append(1), real(*given)),
    )
    with pytest.raises(UsageError, match=r"cannot write .*file\.png: No such file or directory"):
        run_benchmarks(options, comm, Console(comm.rank == 0, StringIO()))
    assert seen == [1]


def test_a_picture_that_fails_takes_nothing_else(
    comm: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever matplotlib raises: the figures are printed, and the profile is saved."""

    def fail(*given: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setitem(run_benchmarks.__globals__, "draw_bandwidth", fail)
    said = StringIO()
    options = replace(
        QUICK, what="memory", plot=folder / "a.png", csv=folder / "a.csv", save=folder / "a.json"
    )
    with pytest.raises(UsageError, match=r"cannot write .*a\.png: RuntimeError: no font"):
        run_benchmarks(options, comm, Console(comm.rank == 0, said))
    comm.Barrier()
    if comm.rank == 0:
        assert "memory" in said.getvalue()
        assert sorted(path.name for path in folder.iterdir()) == ["a.csv", "a.json"]
    comm.Barrier()


@pytest.mark.parametrize(
    ("what", "sizes", "needed"),
    [
        ("allreduce", "900G", 2 * 900 << 30),
        ("gemm", "32K", 3 * (32 << 10) ** 2 * 4),
        ("barrier", "900G", 0),
        ("memory", "1G", 3 << 30),
    ],
)
def test_the_memory_that_sizes_need(what: str, sizes: str, needed: int) -> None:
    assert needed_bytes(BenchOptions(what, sizes=sizes), what) == needed


@pytest.mark.parametrize("what", ["allreduce", "latency", "memory", "filesystem"])
def test_sizes_beyond_the_memory_are_refused_with_the_number(
    comm: Any, folder: Path, what: str
) -> None:
    options = BenchOptions(what, sizes="900G", folder=folder)
    with pytest.raises(UsageError, match=rf"bench {what} .* needs .*TiB a rank|needs 900.0 GiB"):
        run_benchmarks(options, comm, Console(False))
    assert list(folder.iterdir()) == []


def test_a_plot_is_a_png() -> None:
    with pytest.raises(UsageError, match=r"--plot draws a PNG; end the name p\.xyz in \.png"):
        BenchOptions("memory", plot=Path("p.xyz"))
    assert BenchOptions("memory", plot=Path("P.PNG")).plot
