import itertools
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpillm.errors import UsageError
from mpillm.launch.batch_script import BatchJob, render_script, stop_seconds_for
from mpillm.launch.quoting import Verbatim, finalize, quote
from mpillm.launch.schedulers.scheduler_catalog import script_systems
from mpillm.launch.site import Site, load_site

EXAMPLES = sorted((Path(__file__).parents[2] / "jobs" / "sites").glob("*.toml"))
NASTY = (
    'it\'s a "$(touch CANARY)" `touch CANARY` \\ * ~ {a,b} !x #x -x ü “q” ‘r’ \u00a0 & ; | '
    "> CANARY $HOME"
)

# The options of the scripts, as documented: sbatch(1) of Slurm 23.11; qsub(1B) of the PBS
# Professional 2022 User's Guide, "Submitting a PBS Job" and "Allocating Resources"; bsub of IBM
# Spectrum LSF 10.1's command reference.
DIRECTIVES = {
    "slurm": [
        r"--job-name=[\w.-]+",
        r"--nodes=\d+",
        r"--ntasks-per-node=\d+",
        r"--cpus-per-task=\d+",
        r"--time=\d+:\d\d:\d\d",
        r"--output=job-%j\.out",
        r"--open-mode=append",
        r"--requeue",
        r"--signal=B:USR1@\d{1,5}",
        r"--partition=[\w,-]+",
        r"--account=\w+",
        r"--qos=\w+",
        r"--constraint=\S+",
        r"--gpus-per-node=\d+",
        r"--gres=gpu:\d+",
    ],
    "pbs": [
        r"-N [\w.-]{1,15}",
        r"-l select=\d+:ncpus=\d+:mpiprocs=\d+:ompthreads=\d+(:ngpus=\d+)?(:\w+=\w+)*",
        r"-l place=scatter",
        r"-l walltime=\d+:\d\d:\d\d",
        r"-j oe",
        r"-r y",
        r"-q \w+",
        r"-A \w+",
    ],
    "lsf": [
        r"-J [\w.-]+",
        r"-n \d+",
        r"-nnodes \d+",
        r'-R "span\[ptile=\d+\]( select\[[^\]"]+\])?"',
        r'-gpu "num=\d+"',
        r"-W \d+:\d\d",
        r"-wa URG",
        r"-wt \d+",
        r"-Q 75",
        r"-r",
        r"-o job-%J\.lsf",
        r"-q \w+",
        r"-P \w+",
    ],
}
PREFIX = {"slurm": "#SBATCH ", "pbs": "#PBS ", "lsf": "#BSUB "}


def job(**settings: Any) -> BatchJob:
    return BatchJob(
        **{
            "name": "quick",
            "run": f"/x/{NASTY}",
            "folder": f"/y/{NASTY}",
            "nodes": 2,
            "ranks_per_node": 2,
            "threads": 4,
            "command": (
                "/e/bin/python",
                "-m",
                "mpillm",
                "train",
                f"/x/{NASTY}/job.toml",
                "--resume",
            ),
            "seconds": 5400,
            "stop_seconds": 270,
            "data": f"/d/{NASTY}",
            **settings,
        }
    )


def sites(scheduler: str) -> Iterator[Site]:
    full: dict[str, Any] = {
        "partition": "batch",
        "account": "abc1",
        "constraint": "type=big",
        "modules": ("GCC/13", "Open~MPI"),
        "environment": f"/e/{NASTY}",
        "variables": {"A_B": NASTY, "C": ""},
        "launcher_arguments": ("--a=b,c", NASTY),
        "node_local": f"$TMPDIR/{NASTY}",
        "qos": "low" if scheduler == "slurm" else "",
    }
    yield Site()
    yield Site(**full)
    yield Site(
        launcher="mpirun", node_local="${SCRATCH}", program=("apptainer", "exec", NASTY, "mpillm")
    )
    yield Site(
        launcher="mpiexec",
        node_local=f"/{NASTY}",
        launcher_arguments=("--map-by", "core"),
        gpu_request="gres",
    )
    if scheduler == "lsf":
        yield Site(launcher="jsrun", node_local="/tmp")


def scripts() -> dict[str, str]:
    """Name → script: every scheduler, site, and option."""
    found = {}
    for scheduler in script_systems():
        for number, site in enumerate(sites(scheduler)):
            for stage, oversubscribe, gpus in itertools.product(
                (False, True), (False, True), (0, 2)
            ):
                if site.node_local or not stage:
                    made = job(
                        stage=stage,
                        oversubscribe=oversubscribe,
                        gpus_per_node=gpus,
                        cores_per_node=4,
                        hdf5_file_locking="FALSE" if gpus else "",
                    )
                    found[f"{scheduler}-{number}-{stage:d}{oversubscribe:d}{gpus}"] = render_script(
                        scheduler, made, site
                    )
    return found


def shellcheck(paths: list[Path], *options: str) -> str:
    """Return the output of shellcheck; skip the test where it is not installed."""
    program = shutil.which(
        "shellcheck", path=f"{sysconfig.get_path('scripts')}:/usr/bin:/usr/local/bin"
    )
    if program is None:
        pytest.skip("there is no shellcheck")
    return subprocess.run(
        [program, *options, *paths], text=True, capture_output=True, check=False
    ).stdout


@pytest.mark.usefixtures("processes")
def test_every_script_passes_bash_and_shellcheck(tmp_path: Path) -> None:
    paths = []
    for name, script in scripts().items():
        paths.append(tmp_path / f"{name}.sh")
        paths[-1].write_text(script)
        subprocess.run(["bash", "-n", paths[-1]], check=True)
    assert len(paths) > 60
    assert shellcheck(paths) == ""


@pytest.mark.parametrize("scheduler", list(script_systems()))
def test_directives_are_as_documented(scheduler: str) -> None:
    seen = set()
    for name, script in scripts().items():
        if not name.startswith(scheduler):
            continue
        lines = script.splitlines()
        assert lines[0] == "#!/bin/bash"
        first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
        found = [line for line in lines if line.startswith(PREFIX[scheduler])]
        assert found == lines[1 : len(found) + 1], "directives come before the first command"
        assert first > len(found)
        for line in found:
            option = line.removeprefix(PREFIX[scheduler])
            fits = [pattern for pattern in DIRECTIVES[scheduler] if re.fullmatch(pattern, option)]
            assert fits, f"{line} is not documented so"
            seen.update(fits)
    assert seen == set(DIRECTIVES[scheduler]), "each documented option is used somewhere"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_site_gives_a_script(path: Path) -> None:
    site = load_site(path, {"HOME": "/h"})
    script = render_script(
        site.scheduler, job(stage=bool(site.node_local), gpus_per_node=site.gpus_per_node), site
    )
    for directive in site.directives:
        assert f"{PREFIX[site.scheduler]}{directive}\n" in script


def test_what_each_batch_system_is_asked_for() -> None:
    slurm = render_script("slurm", job(), Site(partition="p", directives=("--mem=0",)))
    for line in (
        "--nodes=2",
        "--ntasks-per-node=2",
        "--cpus-per-task=4",
        "--time=01:30:00",
        "--signal=B:USR1@270",
        "--partition=p",
        "--mem=0",
    ):
        assert f"#SBATCH {line}\n" in slurm
    assert "select=2:ncpus=8:mpiprocs=2:ompthreads=4:ngpus=1\n" in render_script(
        "pbs", job(gpus_per_node=1), Site()
    )
    lsf = render_script("lsf", job(), Site(constraint="mem>1"))
    for line in ("-n 16", '-R "span[ptile=8] select[mem>1]"', "-W 1:30", "-wt 5"):
        assert f"#BSUB {line}\n" in lsf


@pytest.mark.parametrize(
    ("scheduler", "settings", "site", "message"),
    [
        ("pbs", {}, {"qos": "low"}, "only Slurm has qualities of service"),
        ("pbs", {}, {"launcher": "srun"}, "launcher = 'srun' does not exist under pbs"),
        ("slurm", {}, {"launcher": "jsrun"}, "launcher = 'jsrun' does not exist under slurm"),
        ("slurm", {"stage": True}, {}, "set node_local"),
        ("slurm", {"stop_seconds": 5400}, {}, "cannot stop"),
        ("slurm", {"name": "a b"}, {}, "the job's name starts with a letter"),
        ("slurm", {"name": "a\n#SBATCH -x"}, {}, "the job's name"),
        ("slurm", {"partition": "$(x)"}, {}, "partition is a word"),
        ("slurm", {"run": "/x\ny"}, {}, r"'/x\\ny' holds '\\n'"),
        ("slurm", {"folder": "/x\udc80"}, {}, "outside of UTF-8"),
        ("slurm", {"command": ("a", "\x1b[2J")}, {}, r"holds '\\x1b'"),
    ],
)
def test_what_cannot_be_asked_for(
    scheduler: str, settings: dict[str, Any], site: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        render_script(scheduler, job(**settings), Site(**site))


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    "text",
    [NASTY, "", "-n", "~", "a b", "'", "\\", "\\'", "$", "``", "a=b", "é", "’‘”", "x" * 3000],
)
def test_a_quoted_word_is_that_word(text: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-uc", f"printf '%s' {quote(text)}"],
        text=True,
        capture_output=True,
        check=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.stdout == text
    assert list(tmp_path.iterdir()) == []


def test_a_template_quotes_what_it_writes() -> None:
    assert finalize("a b") == "'a b'"
    assert finalize(Verbatim("a b")) == "a b"
    assert finalize(7) == "7"
    for value in (None, True, 1.5, ["a"]):
        with pytest.raises(TypeError):
            finalize(value)


def test_when_a_job_is_told_to_stop() -> None:
    assert stop_seconds_for(24 * 3600) == 600
    assert stop_seconds_for(3600) == 180
    assert stop_seconds_for(600) == 60
    assert stop_seconds_for(30) == 10
