"""`mpillm submit` and what becomes of its jobs, on a real Slurm of two nodes."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.system.console import Console
from mpillm.tokens.prepare import PrepareOptions, prepare

pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.slurm]

STEPS = 90
ON_TWO_NODES = ("--nodes", "2", "--ranks-per-node", "2", "--time", "0:20:00")
MPI_TYPE = "pmix" if "Open MPI" in MPI.Get_library_version() else "pmi2"


@pytest.fixture(scope="module")
def recipe(slurm: Any) -> Path:
    """Write a recipe whose bits are the same in any layout, on a small dataset of bytes."""
    folder = Path(slurm.folder)
    text, data, path = folder / "text", folder / "data", folder / "tiny.toml"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(
            f"The {number}th of many lines that are much alike.\n" * 20
        )
    prepare(
        PrepareOptions((str(text),), data, tokenizer="bytes", validation=0.1),
        MPI.COMM_WORLD,
        Console(speaks=False),
    )
    path.write_text(
        "[model]\nlayers = 2\nwidth = 32\nheads = 4\ncontext = 32\n"
        f"[data]\npath = {json.dumps(str(data))}\n"
        f"[train]\nsteps = {STEPS}\nbatch = 8\nmicrobatch = 1\nfixed_order = true\n"
    )
    return path


@pytest.fixture(scope="module")
def expected(slurm: Any, recipe: Path, mpillm: Callable[..., Any]) -> list[float]:
    """Train the recipe under mpirun, and return its losses."""
    run = slurm.folder / "mpirun"
    done = mpillm("train", recipe, "--set", f"train.run={run}", ranks=4)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(run)


@pytest.fixture(scope="module")
def site(slurm: Any) -> Path:
    return site_file(slurm.folder / "site.toml")


@pytest.fixture(scope="module")
def trained(slurm: Any, recipe: Path, site: Path) -> Path:
    """Train a run to its end in a job."""
    run = Path(slurm.folder) / "trained"
    ended = slurm.wait_for_end(submitted(slurm, recipe, run, site, *ON_TWO_NODES))
    assert ended == "COMPLETED", slurm.outputs()
    return run


def site_file(path: Path, **more: object) -> Path:
    keys = {"cores_per_node": 2, "launcher_arguments": [f"--mpi={MPI_TYPE}"], **more}
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
    return path


def submit(slurm: Any, recipe: Path, run: Path, site: Path, *arguments: str) -> Any:
    return slurm.mpillm(
        "submit",
        recipe,
        "--scheduler",
        "slurm",
        "--site",
        site,
        "--set",
        f"train.run={run}",
        *arguments,
    )


def submitted(slurm: Any, recipe: Path, run: Path, site: Path, *arguments: str) -> str:
    """Return the number of the job."""
    done = submit(slurm, recipe, run, site, "--json", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    number: str = json.loads(done.stdout)["job"]["id"]
    return number


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run: Path) -> list[float]:
    """Return the losses of the steps 1, 2 …; each must be there once."""
    steps = [line for line in lines(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == [number + 1 for number in range(len(steps))]
    return [line["loss"] for line in steps]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in lines(run / "history.jsonl") if line["event"] == name]


def outcome(run: Path) -> str:
    return (run / "outcome").read_text().strip()


@pytest.mark.slow("makes the cluster, and trains by srun and by mpirun")
def test_a_job_trains_as_mpirun_does(trained: Path, expected: list[float]) -> None:
    assert len(expected) == STEPS
    assert losses(trained) == expected
    assert outcome(trained) == "finished"
    (start,) = events(trained, "started")
    assert start["hosts"] == {"n1": [0, 1], "n2": [2, 3]}
    assert start["job"]["scheduler"] == "slurm"
    assert start["deadline"] is not None


def test_a_run_goes_on_with_other_nodes_if_its_layout_can(
    slurm: Any, recipe: Path, trained: Path
) -> None:
    more = ("--resume", "--time", "0:20:00", "--set", f"train.steps={STEPS + 5}")
    by_mpirun = site_file(slurm.folder / "mpirun.toml", launcher="mpirun", launcher_arguments=[])
    one_node = ("--nodes", "1", "--ranks-per-node", "2")
    fixed = submit(slurm, recipe, trained, by_mpirun, *one_node, *more, "--set", "parallel.data=4")
    assert fixed.returncode != 0
    assert "data=2" in fixed.stderr
    assert slurm.run("squeue", "--noheader").stdout == ""
    two_nodes = ("--nodes", "2", "--ranks-per-node", "1")
    ended = slurm.wait_for_end(submitted(slurm, recipe, trained, by_mpirun, *two_nodes, *more))
    assert ended == "COMPLETED", slurm.outputs()
    assert len(losses(trained)) == STEPS + 5
    assert events(trained, "started")[-1]["hosts"] == {"n1": [0], "n2": [1]}


def test_an_unknown_partition_is_refused_in_slurms_own_words(
    slurm: Any, recipe: Path, site: Path
) -> None:
    run = slurm.folder / "nowhere"
    done = submit(slurm, recipe, run, site, *ON_TWO_NODES, "--partition", "nowhere")
    assert done.returncode != 0
    assert "invalid partition specified: nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert slurm.run("squeue", "--noheader").stdout == ""
    assert not (run / "job.json").exists()


@pytest.fixture
def slow_link(slurm: Any) -> Iterator[Callable[[], None]]:
    """Slow the link to at least half a second a step on any machine; call it to undo that."""
    for node in ("n1", "n2"):
        done = slurm.run(
            "tc",
            "qdisc",
            "add",
            "dev",
            node,
            "root",
            "tbf",
            "rate",
            "2mbit",
            "burst",
            "16kb",
            "latency",
            "2s",
        )
        assert done.returncode == 0, done.stderr

    def end() -> None:
        for node in ("n1", "n2"):
            slurm.run("tc", "qdisc", "del", "dev", node, "root")

    yield end
    end()


@pytest.mark.slow("Slurm's own timers: a time limit of a minute, and a requeue")
def test_a_job_that_runs_out_of_time_goes_on_by_itself(
    slurm: Any, recipe: Path, expected: list[float], slow_link: Callable[[], None]
) -> None:
    run = slurm.folder / "in parts"
    # Slurm checks limits twice a minute: it sends the signal 10 to 40 seconds after the start.
    site = site_file(slurm.folder / "short.toml", stop_seconds=80)
    number = submitted(
        slurm, recipe, run, site, "--nodes", "2", "--ranks-per-node", "2", "--time", "0:02:00"
    )
    slurm.wait_until(number, lambda: slurm.job(number)["Restarts"] == "2")
    slow_link()
    slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=20")
    assert slurm.wait_for_end(number) == "COMPLETED", slurm.outputs()
    assert losses(run) == expected
    assert [start["job"]["restart"] for start in events(run, "started")] == [0, 1, 2]
    assert ["SIGUSR1" in stop["reason"] for stop in events(run, "stopped")] == [True, True]
    assert outcome(run) == "finished"


@pytest.fixture(scope="module")
def running(slurm: Any, recipe: Path, site: Path) -> tuple[str, Path]:
    """Start a job that does not end by itself; return its number and run after a checkpoint."""
    run = slurm.folder / "running"
    endless = ("--set", "train.steps=1000000", "--set", "train.save_every=5")
    number = submitted(slurm, recipe, run, site, *ON_TWO_NODES, *endless)
    slurm.wait_until(number, lambda: events(run, "saved"))
    return number, run


def test_status_tells_what_slurm_tells(slurm: Any, running: tuple[str, Path]) -> None:
    number, run = running
    done = slurm.mpillm("status", run, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {"scheduler": "slurm", "id": number, "state": "RUNNING"}.items() <= told["job"].items()
    assert told["state"] == "running"


def test_a_run_is_for_one_job(
    slurm: Any, recipe: Path, site: Path, running: tuple[str, Path]
) -> None:
    number, run = running
    again = submit(slurm, recipe, run, site, *ON_TWO_NODES, "--resume")
    assert again.returncode != 0
    assert f"job {number}" in again.stderr
    words = [sys.executable, "-m", "mpillm", "train", run / "job.toml", "--resume"]
    second = slurm.run("srun", "--nodes=2", "--ntasks=2", f"--mpi={MPI_TYPE}", *words)
    assert second.returncode != 0
    assert second.stderr.count(f"held by job {number}") == 1
    assert "Traceback" not in second.stderr
    assert slurm.job(number)["JobState"] == "RUNNING"


@pytest.mark.slow("Slurm's own timers: a node is down, then comes back")
def test_a_job_goes_on_when_its_node_is_back(slurm: Any, running: tuple[str, Path]) -> None:
    number, run = running
    assert slurm.cluster("kill-node", "n2").returncode == 0
    try:
        slurm.wait_until(number, lambda: slurm.job(number)["Restarts"] == "1")
    finally:
        assert slurm.cluster("start-node", "n2").returncode == 0
    slurm.wait_until(number, lambda: len(events(run, "started")) == 2)
    first, second = events(run, "started")
    assert second["step"] >= 5
    assert second["hosts"] == first["hosts"]


def test_a_cancelled_job_saves_and_stays_away(slurm: Any, running: tuple[str, Path]) -> None:
    number, run = running
    assert slurm.run("scancel", number).returncode == 0
    assert slurm.wait_for_end(number) == "CANCELLED"
    assert slurm.run("squeue", "--noheader").stdout == ""
    assert outcome(run) == "stopped"
    (stop,) = events(run, "stopped")
    assert (run / "checkpoints" / f"step-{stop['step']:08d}" / "index.json").exists()
    assert len(losses(run)) == stop["step"]


@pytest.mark.skipif(MPI_TYPE != "pmix", reason="only Open MPI's ranks are started by PMIx")
def test_no_rank_speaks_before_all_are_there(slurm: Any) -> None:
    late_rank = Path(__file__).parents[1] / "fixtures" / "late_rank.py"
    srun = ("srun", "--nodes=2", "--ntasks=2", f"--mpi={MPI_TYPE}")
    done = slurm.run(*srun, sys.executable, late_rank, slurm.folder / "late")
    assert done.returncode == 0, done.stderr


def test_the_doctor_knows_the_right_launcher(slurm: Any) -> None:
    def findings(mpi: str) -> dict[str, dict[str, Any]]:
        doctor = [sys.executable, "-m", "mpillm", "doctor", slurm.folder, "--json"]
        done = slurm.run("srun", "--nodes=2", "--ntasks-per-node=2", f"--mpi={mpi}", *doctor)
        told = json.loads(done.stdout)
        assert (done.returncode == 0) == (told["counts"]["error"] == 0), done.stderr
        return {finding["name"]: finding for finding in told["findings"]}

    right = findings(MPI_TYPE)
    assert "launcher" not in right
    assert {right[name]["verdict"] for name in ("library", "alike", "between hosts")} == {"ok"}
    wrong = findings("none")["launcher"]
    assert wrong["verdict"] == "error"
    assert f"--mpi={MPI_TYPE}" in wrong["remedy"]
