"""Train and benchmark over two hosts, made of network namespaces: the losses are those of one."""

import json
import os
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

TWO_HOSTS = Path(__file__).parents[1] / "fixtures" / "two_hosts.sh"
UNAVAILABLE = 77
START = "import os, sys; os.execvp('sh', ['sh', *sys.argv[1:]])"
STEPS = 12

Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.multihost]


@pytest.fixture
def over_two_hosts(python: Run) -> Run:
    """Run `mpillm ARGUMENTS…` on two hosts with two ranks each."""

    def run(*command: str | Path) -> "subprocess.CompletedProcess[str]":
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        return python(
            "-c", START, TWO_HOSTS, "--rate", "1gbit", "--ranks-per-host", "2", *command, PATH=path
        )

    # Not `true`: Open MPI's mpirun may hang on processes that end before it has heard of them all.
    tried = run("sleep", "1")
    if tried.returncode == UNAVAILABLE:
        pytest.skip(tried.stderr.strip().splitlines()[-1])
    assert tried.returncode == 0, tried.stdout + tried.stderr
    return lambda *arguments: run("python", "-m", "mpillm", *arguments)


def recipe(folder: Path, data: Path) -> Path:
    path = folder / "tiny.toml"
    path.write_text(
        "[model]\nlayers = 2\nwidth = 32\nheads = 4\ncontext = 32\n"
        f"[data]\npath = {json.dumps(str(data))}\n"
        f"[train]\nsteps = {STEPS}\nbatch = 8\nmicrobatch = 1\n"
    )
    return path


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def started_on(run: Path) -> dict[str, list[int]]:
    hosts: dict[str, list[int]] = json.loads((run / "history.jsonl").read_text().splitlines()[0])[
        "hosts"
    ]
    return hosts


@pytest.mark.slow("trains on two hosts in each layout, over a link of 1 Gbit/s")
def test_losses_are_those_of_one_host(
    over_two_hosts: Run, mpillm: Run, data: Path, folder: Path
) -> None:
    path = recipe(folder, data)

    def trained(by: Run, name: str, *settings: str, **how: object) -> Path:
        run = folder / name
        done = by(
            "train",
            path,
            *(word for setting in (f"train.run={run}", *settings) for word in ("--set", setting)),
            **how,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return run

    expected = losses(trained(mpillm, "one host", "train.fixed_order=true", ranks=4))
    assert len(expected) == STEPS
    shared = trained(over_two_hosts, "batch shared")
    assert started_on(shared) == {"host1": [0, 1], "host2": [2, 3]}
    assert losses(shared) == pytest.approx(expected, rel=1e-5)
    layers = trained(
        over_two_hosts, "layers shared", "parallel.pipeline=2", "train.fixed_order=true"
    )
    assert started_on(layers) == {"host1": [0, 1], "host2": [2, 3]}
    assert losses(layers) == expected


def test_every_algorithm_sums_right(over_two_hosts: Run) -> None:
    done = over_two_hosts(
        "bench", "allreduce", "--sizes", "4K,256K", "--iterations", "3", "--check", "--json"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        row for row in json.loads(done.stdout)["results"][0]["rows"] if row["algorithm"] != "floor"
    ]
    assert {"two-level", "mpi"} <= {row["algorithm"] for row in rows}
    assert all(row["wrong"] == 0 for row in rows)
