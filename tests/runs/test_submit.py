import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.errors import LaunchError, UsageError
from mpillm.launch.schedulers.scheduler_catalog import find_scheduler, is_over, job_state
from mpillm.launch.schedulers.slurm import SLURM
from mpillm.launch.site import Site
from mpillm.runs.lock import RunLock
from mpillm.runs.run_files import read_job
from mpillm.runs.submit import SubmitOptions, SubmittedRecipe, job_name, submit_run
from mpillm.system.console import Console
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.train.recipe import load_recipe, write_recipe

NASTY = "a 'b' $(touch CANARY) `touch CANARY` \"c\" \\ ü"
RECIPE = """[model]
layers = 1
width = 32
heads = 2
context = 32
[data]
path = "prepared"
[train]
batch = 4
steps = 40
"""


def command(folder: Path, name: str, *lines: str) -> None:
    """Write a command of a batch system as a script that records its calls in NAME.calls."""
    path = folder / name
    path.write_text(
        "\n".join(
            ["#!/bin/bash", f'printf "%s\\0" "$PWD" "$@" >>{folder}/{name}.calls', *lines, ""]
        )
    )
    path.chmod(0o755)


def calls(folder: Path, name: str) -> list[str]:
    """Return the current folder and the arguments of each call, one after the other."""
    path = folder / f"{name}.calls"
    return path.read_text().split("\0")[:-1] if path.exists() else []


@pytest.fixture
def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder to submit from, whose bin is on PATH."""
    here = folder / f"rank-{os.getpid()}" / NASTY
    (here / "prepared").mkdir(parents=True)
    (here / "prepared/manifest.json").write_text('{"format": "mpillm.tokens"}')
    (here.parent / "bin").mkdir()
    (here / "r.toml").write_text(RECIPE)
    monkeypatch.chdir(here)
    return here


def environment_of(place: Path, **more: str) -> dict[str, str]:
    return {"PATH": f"{place.parent / 'bin'}:/usr/bin:/bin", "HOME": str(place), **more}


def submitted(place: Path, *overrides: str) -> SubmittedRecipe:
    recipe = load_recipe(place / "r.toml", overrides)
    return SubmittedRecipe(
        "r", recipe.train.run, recipe.data.path, recipe.parallel.profile, write_recipe(recipe)
    )


def options(**settings: Any) -> SubmitOptions:
    return SubmitOptions(**{"nodes": 2, "ranks_per_node": 4, "time": "1:30:00", **settings})


def test_a_dry_run_prints_the_script_alone_and_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    submit_run(
        options(scheduler="slurm", dry_run=True),
        submitted(place),
        Site(),
        Console(),
        environment_of(place),
    )
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash\n#SBATCH --job-name=r\n")
    assert sorted(place.rglob("*")) == before
    submit_run(
        options(scheduler="slurm", dry_run=True, as_json=True),
        submitted(place),
        Site(),
        Console(),
        environment_of(place),
    )
    told = json.loads(capsys.readouterr().out)
    assert told["script"] == out
    assert told["job"] is None
    assert told["command"][-3:] == ["train", f"{place}/runs/r/job.toml", "--resume"]


ANSWERS = {"slurm": ("sbatch", "4242"), "pbs": ("qsub", "4242.head"), "lsf": ("bsub", "4242")}


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("scheduler", list(ANSWERS))
def test_a_job_is_handed_over_and_noted(
    scheduler: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, number = ANSWERS[scheduler]
    answer = "Job <4242> is submitted to queue <normal>." if scheduler == "lsf" else number
    command(place.parent / "bin", name, f"cat >{place.parent}/input", f"echo '{answer}'")
    submit_run(
        options(scheduler=scheduler),
        submitted(place, f"train.run={NASTY}"),
        Site(cores_per_node=32),
        Console(),
        environment_of(place),
    )
    run = place / NASTY
    script = (run / "job.sh").read_text()
    assert calls(place.parent / "bin", name) == [
        str(run),
        *{"slurm": ["--parsable", f"--chdir={run}", "job.sh"], "pbs": ["job.sh"], "lsf": []}[
            scheduler
        ],
    ]
    assert (place.parent / "input").read_text() == (script if scheduler == "lsf" else "")
    assert load_recipe(run / "job.toml").train.run == NASTY
    noted = json.loads((run / "job.json").read_text())
    assert (noted["scheduler"], noted["id"], noted["threads"], noted["seconds"]) == (
        scheduler,
        number,
        8,
        5400,
    )
    assert noted["output"] == f"{run}/job-{number}.out"
    assert read_job(run)["id"] == number
    out = capsys.readouterr().out
    assert out.startswith(script)
    assert f"job {number} is submitted" in out
    assert "2 nodes × 4 ranks × 8 threads for 1:30:00" in out
    assert not list(place.parent.rglob("CANARY"))


@pytest.mark.usefixtures("processes")
def test_the_batch_systems_own_words_are_passed_on(place: Path) -> None:
    words = "sbatch: error: invalid partition specified: nowhere"
    command(place.parent / "bin", "sbatch", f"echo '{words}' >&2", "exit 1")
    with pytest.raises(LaunchError, match=f"Slurm refused the job: {words}"):
        submit_run(
            options(partition="nowhere"), submitted(place), Site(), Console(), environment_of(place)
        )
    assert not (place / "runs/r/job.json").exists()
    command(place.parent / "bin", "sbatch", "echo hello")
    with pytest.raises(LaunchError, match="did not print the job's number, but 'hello'"):
        SLURM.submit_script(str(place), environment_of(place))


@pytest.mark.usefixtures("processes")
def test_a_run_is_submitted_once(place: Path) -> None:
    command(place.parent / "bin", "sbatch", "echo 7")
    command(place.parent / "bin", "squeue", f"cat {place.parent}/state")
    state = place.parent / "state"
    state.write_text("PENDING\n")
    environment = environment_of(place)
    submit_run(options(), submitted(place), Site(), Console(), environment)
    with pytest.raises(UsageError, match=r"is submitted already, as job 7 \(PENDING\)"):
        submit_run(options(), submitted(place), Site(), Console(), environment)
    state.write_text("COMPLETED\n")
    submit_run(options(), submitted(place), Site(), Console(), environment)
    lock = RunLock(place / "runs/r", None)
    try:
        with pytest.raises(UsageError, match=f"is held by process {os.getpid()} on"):
            submit_run(options(), submitted(place), Site(), Console(), environment)
    finally:
        lock.release()


@pytest.mark.parametrize(
    ("settings", "site", "message"),
    [
        ({"nodes": 0}, {}, "--nodes is a number from 1, and not 0"),
        ({"ranks_per_node": -1}, {}, "--ranks-per-node is a number from 1"),
        ({"threads": -1}, {}, "--threads is a number from 0"),
        ({"gpus_per_node": -1}, {}, "--gpus-per-node is a number from 0"),
        ({"max_restarts": -1}, {}, "--max-restarts is a number from 0"),
        ({"nodes": 10**30}, {}, "--nodes is a number from 1 to 10,000,000"),
        ({"time": "nan"}, {}, "H:MM:SS"),
        ({"time": "9" * 50 + "h"}, {}, "H:MM:SS"),
        ({"time": "90"}, {}, "H:MM:SS"),
        (
            {"threads": 8},
            {"cores_per_node": 16},
            "4 ranks × 8 threads need 32 cores a node.* have 16",
        ),
        ({"ranks_per_node": 32}, {"cores_per_node": 16}, "32 ranks × 1 threads need 32 cores"),
        ({"gpus_per_node": 8}, {"gpus_per_node": 4}, "--gpus-per-node 8: a node has 4"),
        ({"scheduler": "sge"}, {}, "--scheduler is auto, slurm, pbs, lsf, and not 'sge'"),
        ({"scheduler": "auto"}, {}, "none of sbatch .Slurm., qsub .PBS., bsub .LSF. is on PATH"),
        ({"stage": True}, {}, "set node_local"),
        ({"name": "x y"}, {}, "the job's name"),
        ({"dry_run": False}, {}, "sbatch of Slurm is not on PATH"),
    ],
)
def test_refusals(
    place: Path, settings: dict[str, Any], site: dict[str, Any], message: str
) -> None:
    with pytest.raises((UsageError, LaunchError), match=message):
        submit_run(
            options(**{"scheduler": "slurm", "dry_run": True, **settings}),
            submitted(place),
            Site(**site),
            Console(),
            {"PATH": str(place)},
        )


def test_more_ranks_than_cores_where_it_is_meant(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = options(scheduler="slurm", dry_run=True, threads=8, oversubscribe=True)
    submit_run(wanted, submitted(place), Site(cores_per_node=16), Console(), environment_of(place))
    out = capsys.readouterr().out
    # Slurm refuses a job of more CPUs than a node has, so srun alone oversubscribes.
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=16\n" in out
    assert "--ntasks-per-node=4 --kill-on-bad-exit=0 --wait=60 --label --overcommit" in out


def test_what_would_fail_later_is_refused_now(place: Path) -> None:
    environment = environment_of(place)

    def refused(
        message: str, recipe: SubmittedRecipe, site: Site | None = None, **settings: Any
    ) -> None:
        with pytest.raises(UsageError, match=message):
            submit_run(
                options(scheduler="slurm", **settings),
                recipe,
                site or Site(),
                Console(),
                environment,
            )

    refused(
        "the data .*/nowhere is no folder; make one with", submitted(place, "data.path=nowhere")
    )
    refused("there is no Python in environment", submitted(place), Site(environment=str(place)))
    refused("is a file; name another", submitted(place, "train.run=r.toml"))
    (place / "old").mkdir()
    (place / "old/metrics.jsonl").touch()
    refused("holds a run already; --resume", submitted(place, "train.run=old"))
    refused("holds a run already; --resume", submitted(place, "train.run=old"), dry_run=True)


@pytest.mark.usefixtures("processes")
def test_of_two_submissions_at_once_one_is_done(place: Path) -> None:
    bin_folder = place.parent / "bin"
    command(bin_folder, "sbatch", f"touch {place.parent}/begun", "sleep 1", "echo 7")
    command(bin_folder, "squeue", "echo PENDING")

    def submit() -> None:
        submit_run(
            options(), submitted(place), Site(), Console(speaks=False), environment_of(place)
        )

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(submit)
        while not (place.parent / "begun").exists():
            time.sleep(0.01)
        with pytest.raises(UsageError, match=r"is being submitted by process \d+ .*; wait for it"):
            submit()
        first.result()
    assert len([word for word in calls(bin_folder, "sbatch") if word == "job.sh"]) == 1
    with pytest.raises(UsageError, match=r"is submitted already, as job 7 \(PENDING\)"):
        submit()
    assert not list((place / "runs/r").glob(".*"))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("prepared/run", "is inside of the dataset .*prepared.* name another train.run"),
        ("prepared", "is inside of the dataset"),
        ("x" * 260, "File name too long; choose a shorter name"),
        ("r.toml/run", "cannot write into the folder .*: Not a directory"),
        ("/proc/mpillm/run", "cannot write into the folder"),
        ("a\nb", "holds '.n'"),
        ("a\x1b", "holds '.x1b'"),
        ("caf\udce9", "outside of UTF-8"),
    ],
)
def test_odd_names_of_runs(place: Path, run: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        submit_run(
            options(scheduler="slurm"),
            replace(submitted(place), run=run),
            Site(),
            Console(speaks=False),
            environment_of(place),
        )


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    "record", ["", "null", "[]", '{"scheduler": 3, "id": []}', '{"id": "7"}', "\0\0"]
)
def test_a_damaged_record_of_a_job_keeps_no_run_from_its_next(place: Path, record: str) -> None:
    command(place.parent / "bin", "sbatch", "echo 8")
    command(place.parent / "bin", "squeue", "echo PENDING")
    run = place / "runs/r"
    run.mkdir(parents=True)
    (run / "job.json").write_text(record)
    submit_run(options(), submitted(place), Site(), Console(speaks=False), environment_of(place))
    assert read_job(run)["id"] == "8"


def test_a_sites_profile_is_for_recipes_that_name_none(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site, dry = (
        Site(profile="/p/cluster.json"),
        options(scheduler="lsf", dry_run=True, as_json=True),
    )
    submit_run(dry, submitted(place), site, Console(), {})
    assert json.loads(capsys.readouterr().out)["command"][-2:] == [
        "--set",
        "parallel.profile=/p/cluster.json",
    ]
    submit_run(dry, submitted(place, "parallel.profile=mine.json"), site, Console(), {})
    assert json.loads(capsys.readouterr().out)["command"][-1] == "--resume"
    forced = options(scheduler="lsf", dry_run=True, as_json=True, force=True)
    submit_run(forced, submitted(place, "parallel.profile=mine.json"), site, Console(), {})
    assert json.loads(capsys.readouterr().out)["command"][-2:] == ["--resume", "--force"]


def test_names_of_jobs() -> None:
    assert job_name("quickstart") == "quickstart"
    assert job_name("my recipe (ü)") == "my-recipe"
    assert job_name("--") == "mpillm"
    assert job_name("$(x)") == "x"
    assert len(job_name("x" * 99)) == 15


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("scheduler", "name", "lines", "state"),
    [
        ("slurm", "squeue", ["echo RUNNING"], "RUNNING"),
        (
            "slurm",
            "scontrol",
            ["echo JobId=7; echo '   JobState=COMPLETED Reason=None'"],
            "COMPLETED",
        ),
        ("slurm", "sacct", ["echo ' CANCELLED by 0 '"], "CANCELLED"),
        ("slurm", "squeue", ["echo 'slurm_load_jobs error: Invalid job id' >&2", "exit 1"], None),
        ("pbs", "qstat", ["echo Job Id: 7.head; echo '    job_state = Q'"], "QUEUED"),
        ("pbs", "qstat", ["echo '    job_state = F'"], "FINISHED"),
        ("lsf", "bjobs", ["echo 'PEND '"], "PEND"),
        ("flux", "flux", ["echo RUN"], None),
    ],
)
def test_the_state_of_a_job(
    scheduler: str, name: str, lines: list[str], state: str | None, place: Path
) -> None:
    command(place.parent / "bin", name, *lines)
    environment = {"PATH": f"{place.parent / 'bin'}"}
    (place.parent / "bin/bash").symlink_to("/bin/bash")
    assert job_state(scheduler, "7", environment) == state
    assert job_state(scheduler, "-f; x", environment) is None
    if state:
        assert is_over(scheduler, state) == (state in ("COMPLETED", "CANCELLED", "FINISHED"))
    assert is_over("lsf", "DONE")
    assert not is_over("nowhere.module:Name", "DONE")


@pytest.mark.usefixtures("processes")
def test_the_batch_system_that_is_there(place: Path) -> None:
    folder = place.parent / "bin"
    for name, scheduler in (("bsub", "lsf"), ("qsub", "pbs"), ("sbatch", "slurm")):
        command(folder, name)
        assert find_scheduler("auto", {"PATH": str(folder)}) == scheduler
    assert find_scheduler("lsf", {"PATH": ""}) == "lsf"


# What the batch systems set for a job on this very host.
def allotted(scheduler: str, place: Path, restart: int = 0) -> dict[str, str]:
    hosts = place.parent / "hosts"
    hosts.write_text(f"{socket.gethostname()}\n" * 2)
    return {
        "pbs": {
            "PBS_JOBID": "12.head",
            "PBS_NODEFILE": str(hosts),
            "PBS_O_WORKDIR": str(place / "runs/r"),
            "PBS_ENVIRONMENT": "PBS_BATCH",
            **({"MPILLM_JOB_RESTART": str(restart)} if restart else {}),
        },
        "lsf": {
            "LSB_JOBID": "12",
            "LSB_DJOB_HOSTFILE": str(hosts),
            "LSB_DJOB_NUMPROC": "2",
            "LSB_HOSTS": " ".join([socket.gethostname()] * 2),
        },
        "slurm": {
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_END_TIME": str(int(time.time()) + 600),
            "SLURM_JOB_NODELIST": socket.gethostname(),
            "SLURM_RESTART_COUNT": str(restart),
        },
    }[scheduler]


def run_stub(
    scheduler: str, place: Path, program: str, restart: int = 0, **settings: Any
) -> tuple[int, str]:
    """Run a script with `program` as srun or mpirun; return (exit code, output)."""
    folder, run = place.parent / "bin", place / "runs/r"
    for name in ("srun", "mpirun"):
        command(folder, name, '[ "$*" != --version ] || { echo HYDRA; exit; }', program)
    run.mkdir(parents=True, exist_ok=True)
    capture = Path(place.parent / "script")
    with capture.open("w") as stream:
        submit_run(
            options(
                scheduler=scheduler,
                dry_run=True,
                nodes=1,
                ranks_per_node=2,
                resume=True,
                **settings,
            ),
            submitted(place),
            Site(node_local=f"{place.parent}/local", program=("mpillm",)),
            Console(stream=stream),
            environment_of(place),
        )
    environment = environment_of(place, RUN=str(run), **allotted(scheduler, place, restart))
    (run / "job.json").write_text('{\n "scheduler": "pbs",\n "id": "12.head",\n "name": "r"\n}\n')
    done = subprocess.run(
        ["bash", capture],
        env=environment,
        text=True,
        capture_output=True,
        check=False,
        timeout=120,
        cwd=run,
    )
    out = done.stdout + done.stderr
    return done.returncode, out + "".join(path.read_text() for path in run.glob("job-12*.out"))


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("scheduler", ["slurm", "pbs", "lsf"])
def test_the_exit_code_tells_what_became_of_the_run(scheduler: str, place: Path) -> None:
    bin_folder, run = place.parent / "bin", place / "runs/r"
    command(bin_folder, "scontrol", "[ $1 != requeue ] || kill -TERM $PPID")
    command(bin_folder, "squeue", "echo RUNNING")
    command(bin_folder, "qsub", "echo 13.head")
    again = {"slurm": -15, "pbs": 75, "lsf": 75}[scheduler]
    given_up = 1 if scheduler == "lsf" else 75
    word = 'echo %s >"$RUN/outcome"; exit %s'
    assert run_stub(scheduler, place, word % ("finished", 0))[0] == 0
    # A launcher may say 1 after all was saved, and 0 after it lost a node.
    assert run_stub(scheduler, place, word % ("finished", 1))[0] == 0
    assert run_stub(scheduler, place, word % ("running", 0))[0] == 1
    assert run_stub(scheduler, place, word % ("failed", 3))[0] == 3
    assert run_stub(scheduler, place, "exit 7")[0] == 7, (
        "an outcome of an earlier job is not this one's"
    )
    assert run_stub(scheduler, place, "exit 0")[0] == 1
    assert run_stub(scheduler, place, word % ("stopped", 75), max_restarts=9)[0] == again
    asked = {"slurm": calls(bin_folder, "scontrol"), "pbs": calls(bin_folder, "qsub"), "lsf": []}[
        scheduler
    ]
    assert (
        asked
        == {
            "slurm": [str(place), "requeue", "12"],
            "pbs": [str(run), "-v", "MPILLM_JOB_RESTART=1", "job.sh"],
            "lsf": [],
        }[scheduler]
    )
    assert read_job(run)["id"] == ("13.head" if scheduler == "pbs" else "12.head")
    code, out = run_stub(scheduler, place, word % ("stopped", 75), restart=3, max_restarts=3)
    assert code == given_up
    assert "the job was started 3 times more" in out


@pytest.mark.usefixtures("processes")
def test_a_job_that_is_cancelled_does_not_come_back(place: Path) -> None:
    for name in ("scontrol", "qsub"):
        command(place.parent / "bin", name)
    command(place.parent / "bin", "squeue", "echo COMPLETING")
    # As a batch system does: every process of the job gets SIGTERM, and the ranks save.
    program = (
        "trap 'echo stopped >\"$RUN/outcome\"; exit 75' USR1 TERM; kill -TERM $PPID; "
        "for i in {1..100}; do sleep 0.1; done"
    )
    for scheduler in ("slurm", "pbs", "lsf"):
        code, out = run_stub(scheduler, place, program)
        assert code == (1 if scheduler == "lsf" else 75), out
        assert "the batch system ended the job, so it is not submitted again" in out
    code, out = run_stub("slurm", place, 'echo stopped >"$RUN/outcome"; exit 75')
    assert "the job is COMPLETING, so it is not submitted again" in out
    assert calls(place.parent / "bin", "scontrol") == calls(place.parent / "bin", "qsub") == []


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("scheduler", "sign"), [("slurm", "USR1"), ("lsf", "URG"), ("lsf", "USR2"), ("pbs", "")]
)
def test_the_sign_before_the_limit_reaches_the_ranks_each_time(
    scheduler: str, sign: str, place: Path
) -> None:
    command(place.parent / "bin", "qsub", "echo 13.head")
    command(place.parent / "bin", "squeue", "echo TIMEOUT")
    # The script's shell gets two signals, and the ranks save on the second one only. So neither may
    # be lost, and neither may end the shell's waiting.
    send = (
        f"kill -{sign} $PPID; sleep 0.5; kill -{sign} $PPID"
        if sign
        else "sleep 4; kill -USR1 $PPID"
    )
    program = (
        "n=0; trap 'n=$((n + 1)); "
        'if [ $n -eq 2 ]; then echo stopped >"$RUN/outcome"; exit 75; fi\' USR1; '
        f"({send}) & for i in {{1..300}}; do sleep 0.1; done; exit 9"
    ).replace("$PPID", '"$JOB_SHELL"')
    code, out = run_stub(
        scheduler, place, f"JOB_SHELL=$PPID; {program}", time="1:30:00" if sign else "3s"
    )
    assert code == 75, out
    assert out.count("the time limit is near: asking the ranks to save and stop") == 2


@pytest.mark.usefixtures("processes")
def test_staging(place: Path) -> None:
    (place / "prepared/deep").mkdir()
    (place / "prepared/deep/a b").write_text("tokens")
    local = place.parent / "local"
    local.mkdir()
    program = (
        'data=${*: -1}; data=${data#data.path=}; cat "$data/deep/a b"; '
        'echo finished >"$RUN/outcome"'
    )
    code, out = run_stub(
        "slurm", place, f'if [ "${{*: -2:1}}" = --set ]; then {program}; fi', stage=True
    )
    assert code == 0, out
    assert "tokens" in out
    arguments = calls(place.parent / "bin", "srun")
    assert f"data.path={local}/mpillm-12-0" in arguments
    # The launcher removes the copy again, by one process a node.
    assert arguments[-4:] == ["rm", "-rf", "--", f"{local}/mpillm-12-0"]
    shutil.rmtree(local)
    (place.parent / "bin/srun.calls").unlink()
    code, out = run_stub("slurm", place, 'echo finished >"$RUN/outcome"', stage=True)
    assert code == 0
    assert "the copy failed: training reads" in out
    assert "--set" not in calls(place.parent / "bin", "srun")


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("scheduler", ["pbs", "lsf"])
def test_training_under_the_environment_of(scheduler: str, place: Path, documents: Path) -> None:
    """Run a real script under the real mpirun: stop before its limit, submit again, finish."""
    (place / "prepared/manifest.json").unlink()
    data = PrepareOptions((str(documents),), place / "prepared", tokenizer="bytes")
    prepare(data, MPI.COMM_WORLD, Console(speaks=False))
    folder, run = place.parent / "bin", place / "runs/r"
    command(folder, "qsub", "echo 13.head")
    run.mkdir(parents=True)

    def once(steps: int, stop: bool) -> tuple[int, str]:
        recipe = submitted(place, f"train.steps={steps}")
        (run / "job.toml").write_text(recipe.text)
        with (place.parent / "script").open("w") as stream:
            submit_run(
                options(
                    scheduler=scheduler,
                    nodes=1,
                    ranks_per_node=2,
                    time="10m",
                    threads=1,
                    oversubscribe=True,
                    dry_run=True,
                    resume=True,
                ),
                recipe,
                Site(program=(sys.executable, "-m", "mpillm")),
                Console(stream=stream),
                environment_of(place),
            )
        path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {
            **os.environ,
            "PATH": path,
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        for name in [name for name in environment if name.startswith(("PMIX_", "PRTE_", "PMI_"))]:
            del environment[name]
        process = subprocess.Popen(
            ["bash", place.parent / "script"], env=environment | allotted(scheduler, place)
        )
        log = run / "metrics.jsonl"
        while (
            stop
            and process.poll() is None
            and not (log.exists() and log.read_text().count("\n") > 3)
        ):
            time.sleep(0.2)
        if stop:
            # LSF sends URG; PBS sends nothing, so there the script's own timer sends USR1.
            os.kill(process.pid, signal.SIGURG if scheduler == "lsf" else signal.SIGUSR1)
        return process.wait(timeout=300), next(run.glob("job-12*.out")).read_text()

    code, out = once(1_000_000, stop=True)
    assert code == 75, out
    assert (run / "outcome").read_text() == "stopped\n"
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert calls(folder, "qsub") == (
        [str(run), "-v", "MPILLM_JOB_RESTART=1", "job.sh"] if scheduler == "pbs" else []
    )
    code, out = once(steps + 3, stop=False)
    assert code == 0, out
    assert (run / "outcome").read_text() == "finished\n"
    assert f"continuing from runs/r/checkpoints/step-{steps:08d}" in out
    assert "[1,0]<stdout>" in out or "[0]" in out, "each line has its rank"
    assert not list(place.parent.rglob("CANARY"))
