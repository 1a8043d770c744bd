"""Run the steps of gpu.sh, each within a time limit, and print what they found as one page.

Python's own library alone: what else is missing is named, with the steps that are left out for it.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# The whole run, the end of its last process included: 8 and 3 minutes.
WHOLE_SECONDS = {False: 465, True: 170}
# A package whose module has another name.
MODULES = {"annotated-types": "annotated_types", "pytest": "pytest"}
# A process that is asked to end may take this long.
ENDING_SECONDS = 4.0
NO_GPU = """
import sys
try:
    import torch
except Exception as failure:
    sys.exit(print(f"{sys.executable} has no torch ({failure})"))
if not torch.cuda.is_available():
    print(f"torch {torch.__version__} sees none")
"""
# Tests that take long, or need no GPU to have been right before.
NOT_QUICK = "not every_operation and not lower_dtypes and not other_reductions and not masked"


@dataclass(frozen=True)
class Limits:
    """Seconds of a step: the most that it may take, and the least that earlier steps leave it."""

    most: tuple[int, int]
    """Of a whole run, and of a quick one."""
    least: tuple[int, int]


LIMITS = {
    "compiled module": Limits((60, 40), (0, 0)),
    "facts": Limits((60, 30), (10, 10)),
    "losses": Limits((110, 50), (60, 35)),
    "speed": Limits((250, 75), (170, 50)),
    "tests at 1 rank": Limits((120, 45), (45, 15)),
    "tests at 2 ranks": Limits((120, 45), (40, 10)),
}


@dataclass
class Job:
    """A run of all steps: its options, its folder, and how each step ended."""

    quick: bool
    device: str
    work: Path
    environment: dict[str, str]
    end: float
    outcomes: list[dict[str, object]] = field(default_factory=list)

    def seconds_for(self, name: str) -> int:
        """Return the limit of a step: its own, or what the later ones leave of the whole time."""
        later = list(LIMITS)[list(LIMITS).index(name) + 1 :]
        left = self.end - time.monotonic() - sum(LIMITS[each].least[self.quick] for each in later)
        return max(0, min(LIMITS[name].most[self.quick], int(left)))

    def run(self, name: str, command: Sequence[str | Path], cwd: Path | None = None) -> bool:
        """Run a step, its output printed and in `work`/NAME.log; return whether it did well."""
        print(f"\n== {name}", flush=True)
        limit = self.seconds_for(name)
        if limit < 5:
            self.leave_out(name, "no time is left", said=True)
            return False
        began = time.monotonic()
        code = run_within(
            list(map(str, command)), limit, self.environment, self.log_of(name), cwd or self.work
        )
        outcome = {None: f"longer than {limit} s", 0: ""}.get(code, f"exit code {code}")
        seconds = round(time.monotonic() - began, 1)
        self.outcomes.append({"step": name, "failed": outcome, "seconds": seconds})
        if outcome:
            print(f"failed: {outcome}", flush=True)
        return not outcome

    def leave_out(self, name: str, reason: str, said: bool = False) -> None:
        if not said:
            print(f"\n== {name}")
        print(f"left out: {reason}", flush=True)
        self.outcomes.append({"step": name, "left_out": reason})

    def log_of(self, name: str) -> Path:
        return self.work / (name.replace(" ", "-") + ".log")

    def found(self, file: str) -> dict[str, object]:
        """Read what a step wrote; it may have written nothing."""
        path = self.work / file
        return json.loads(path.read_text()) if path.exists() else {}


def run_within(
    command: list[str], seconds: float, environment: Mapping[str, str], log: Path, cwd: Path
) -> int | None:
    """Run a command, its output copied to `log`; return its exit code, None where it had to end."""
    with log.open("wb") as copy:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        until = time.monotonic() + seconds
        try:
            while process.poll() is None and time.monotonic() < until:
                _pass_on(process.stdout, copy)
                time.sleep(0.05)
            code = process.poll()
        finally:
            _end(process)
            _pass_on(process.stdout, copy)
    return code


def _pass_on(source, copy) -> None:
    while data := source.read(1 << 16):
        copy.write(data)
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process with all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        if number == signal.SIGTERM:
            until = time.monotonic() + ENDING_SECONDS
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
    process.wait()


# What there is ------------------------------------------------------------------------------------


def missing_packages() -> list[str]:
    """List what mpillm needs and this Python has not: the packages of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[>=<\[; ]", text)[0] for text in project["dependencies"]]
    return [
        name
        for name in names
        if importlib.util.find_spec(MODULES.get(name, name.replace("-", "_"))) is None
    ]


def launcher(environment: Mapping[str, str]) -> list[str]:
    """Return the command that starts ranks, more than there are cores; none without an mpirun."""
    found = next(filter(None, map(shutil.which, ("mpirun", "mpiexec"))), None)
    if found is None:
        return []
    told = subprocess.run(
        [found, "--version"], env=dict(environment), text=True, capture_output=True, check=False
    )
    open_mpi = re.search(r"open.?mpi|open.?rte|prrte", told.stdout + told.stderr, re.IGNORECASE)
    return [found, *(["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"] if open_mpi else [])]


def build_command(sources: Path, folder: Path) -> list[str | Path]:
    """Return the command that builds the compiled module, as mpillm/meson.build does.

    It goes where comm/kernel.py looks: mpillm/comm in a folder of sys.path.
    """
    files = sorted(sources.glob("*.[ch]"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    target = folder / "mpillm/comm" / f"_kernel{sysconfig.get_config_var('EXT_SUFFIX')}"
    target.parent.mkdir(parents=True, exist_ok=True)
    headers = dict.fromkeys(sysconfig.get_path(key) for key in ("include", "platinclude"))
    return [
        *os.environ.get("CC", "cc").split(),
        *("-std=c11", "-O3", "-fPIC", "-shared"),
        f'-DMPILLM_SOURCE_HASH="{digest}"',
        *(f"-I{header}" for header in headers),
        *(path for path in files if path.suffix == ".c"),
        "-o",
        target,
    ]


def environment_of(work: Path) -> dict[str, str]:
    """Return the steps' environment: the checkout's files, and nothing is written into the tree."""
    path = [str(work / "built"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    temporary = work / "t"
    temporary.mkdir()
    own = {
        # Removed at the end, whatever a step that was ended has left.
        "TMPDIR": str(temporary),
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TRITON_CACHE_DIR": str(work / "triton"),
        "CUPY_CACHE_DIR": str(work / "cupy"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(work / "hypothesis"),
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "COLUMNS": "120",
    }
    if os.geteuid() == 0:
        own |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**os.environ, **own}


# The steps ----------------------------------------------------------------------------------------


def build(job: Job) -> str:
    """Build the compiled module; return why there is none, or ""."""
    compiler = os.environ.get("CC", "cc").split()[0]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if shutil.which(compiler) is None:
        reason = f"no C compiler ({compiler})"
    elif not header.exists():
        reason = f"no {header}: the headers of this Python are not installed"
    else:
        command = build_command(ROOT / "mpillm/comm/csrc", job.work / "built")
        return "" if job.run("compiled module", command) else "the compiled module was not built"
    job.leave_out("compiled module", reason)
    # One that is installed does as well.
    installed = Path(sysconfig.get_path("platlib")) / "mpillm/comm"
    return "" if list(installed.glob("_kernel*")) else reason


def all_steps(job: Job) -> None:
    """Run what can run here."""
    python = [sys.executable, "-B"]
    fault = build(job)
    quick, device = ["--quick"] * job.quick, ["--device", job.device]
    job.run("facts", [*python, HERE / "facts.py", *device, "--out", job.work / "facts.json"])
    lacking = missing_packages()
    if not fault and lacking:
        fault = f"{sys.executable} lacks {', '.join(lacking)}, which mpillm needs"
    if not fault and not has_mpi(job):
        fault = "mpi4py finds no MPI library"
    if fault:
        for name in ("losses", "speed", "tests at 1 rank", "tests at 2 ranks"):
            job.leave_out(name, fault)
        return
    start = launcher(job.environment)
    cupy = importlib.util.find_spec("cupy") is not None or job.device == "cpu"
    no_pairs = "" if start else "no mpirun and no mpiexec"
    losses = [*python, HERE / "losses.py", *device, *quick, "--launcher", " ".join(start)]
    job.run("losses", [*losses, *(["--no-cupy"] * (not cupy)), "--out", job.work / "losses.json"])
    seconds = str(job.seconds_for("speed") - 10)
    speed = [*python, HERE / "speed.py", *device, *quick, "--seconds", seconds]
    job.run("speed", [*speed, "--out", job.work / "speed.json"])
    run_tests(job, start, no_pairs or ("" if cupy else "no CuPy, through which ranks send"))


def has_mpi(job: Job) -> bool:
    """Try MPI in a process of its own: a library that does not fit ends its process."""
    child = [sys.executable, "-c", "from mpi4py import MPI; MPI.Get_library_version()"]
    try:
        subprocess.run(child, env=job.environment, capture_output=True, timeout=60, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return False
    return True


def run_tests(job: Job, start: list[str], no_pairs: str) -> None:
    """Run the tests marked gpu, by one rank, and by two that share a GPU where there is one."""
    names = ("tests at 1 rank", "tests at 2 ranks")
    if importlib.util.find_spec("pytest") is None:
        for name in names:
            job.leave_out(name, f"{sys.executable} lacks pytest")
        return
    # The files that have such tests: others may import what is not there.
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    command = [sys.executable, "-B", "-m", "pytest", "-q", "--color=no", "-m", "gpu"]
    if job.quick:
        command += ["-k", NOT_QUICK]
    job.run(names[0], [*command, *files], ROOT)
    if no_pairs:
        job.leave_out(names[1], no_pairs)
        return
    job.run(names[1], [*start, "-n", "2", *command, *files], ROOT)


# The page -----------------------------------------------------------------------------------------


def counts(log: Path) -> str:
    """Return pytest's last line: `31 passed, 2 skipped in 12.3s`."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = re.findall(r"^=*\s*((?:\d+ \w+(?:, )?)+ in [\d.]+s)", text, re.MULTILINE)
    return lines[-1] if lines else ""


def page(result: Mapping[str, object]) -> str:
    """Write the figures as Markdown, ready for docs/figures.md."""
    facts = result["facts"]
    assert isinstance(facts, dict)
    lines = [f"## {facts.get('chip', 'One GPU')}", f"{result['date']}.", "```"]
    lines += ["sh benchmarks/gpu.sh" + " --quick" * bool(result["quick"]), "```"]
    lines += table(["", ""], [[name, str(value)] for name, value in facts.items()])
    if losses := result["losses"]:
        assert isinstance(losses, dict)
        rows = [[row["case"], row["found"], row["verdict"]] for row in losses["rows"]]
        lines += ["", *table(["losses", "largest relative difference", ""], rows)]
    if speed := result["speed"]:
        assert isinstance(speed, dict)
        for shape in speed["shapes"]:
            lines += ["", shape["title"], *table(shape["head"], shape["rows"])]
            lines += [f"- {note}" for note in shape["notes"]]
    rows = []
    for step in result["steps"]:  # type: ignore[attr-defined]
        how = step.get("left_out", "") and f"left out: {step['left_out']}"
        how = how or (step.get("failed", "") and f"failed: {step['failed']}") or "done"
        rows.append([step["step"], how, step.get("counts", ""), f"{step.get('seconds', 0):.0f} s"])
    return "\n".join([*lines, "", *table(["step", "", "tests", ""], rows)])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]


def main() -> int:
    options = arguments()
    if options.json:
        # Found out now: figures that have no place are lost after minutes.
        options.json.touch()
    if options.device != "cpu" and (why := without_gpu()):
        print(f"no GPU to measure: {why}")
        return 0
    # Interrupted, it removes its folder all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end = time.monotonic() + WHOLE_SECONDS[options.quick]
    with tempfile.TemporaryDirectory(prefix="mpillm-gpu-") as folder:
        work = Path(folder)
        job = Job(options.quick, options.device, work, environment_of(work), end)
        all_steps(job)
        for step in job.outcomes:
            if text := counts(job.log_of(str(step["step"]))):
                step["counts"] = text
        parts = {name: job.found(f"{name}.json") for name in ("facts", "losses", "speed")}
    date = time.strftime("%Y-%m-%d")
    result = {"date": date, "quick": options.quick, **parts, "steps": job.outcomes}
    print("\n" + page(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    failed = [str(step["step"]) for step in job.outcomes if step.get("failed")]
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return bool(failed)


def without_gpu() -> str:
    """Say why there is nothing to measure; "" with a GPU."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", NO_GPU], text=True, capture_output=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        return "torch did not start within two minutes"
    return done.stdout.strip() or ("torch fails to start" if done.returncode else "")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="within 3 minutes instead of 8: fewer tests and shapes"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    # For work on these scripts: the same steps on tiny shapes, without a GPU.
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
