"""Run programs that a model wrote, each with its tests, and score those that pass (pass@k).

A program runs in a process of its own: see sandbox_child.py. What it may do is bounded by the
kernel, and not by what it looks like.
"""

import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpillm.comm.failure import on_all
from mpillm.errors import UsageError
from mpillm.infer.programs.sandbox_child import READY
from mpillm.infer.scores.score import Score
from mpillm.infer.scores.score_texts import score_samples
from mpillm.system.environment import library_paths

if TYPE_CHECKING:
    from mpi4py import MPI

CHILD = Path(__file__).with_name("sandbox_child.py")
# To start Python on a slow file system, beyond the program's own time.
STARTING_SECONDS = 10.0
LONGEST_REASON = 4096


@dataclass(frozen=True)
class ProgramLimits:
    """What a program may take. `seconds`: of processor time, and twice as many by the clock."""

    seconds: int = 5
    memory_bytes: int = 512 << 20


def joined_program(prompt: str, completion: str, test: str, entry_point: str) -> str:
    """Join a problem of HumanEval's format (Chen et al. 2021) and a completion to a program."""
    return f"{prompt}{completion}\n{test}\ncheck({entry_point})\n"


def passes(program: str, limits: ProgramLimits = ProgramLimits()) -> bool:
    """Run a program in a sandbox; return whether it ran to its end without an error.

    It has Python's standard library, no network, no files but those of an empty folder, and no
    process that outlives it. Raises UsageError where the kernel gives no such sandbox.
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(
        prefix="mpillm-program-", ignore_cleanup_errors=True
    ) as folder:
        place = Path(folder)
        for name in ("root", "work"):
            (place / name).mkdir()
        (place / "input").write_bytes(f"{word}\n{program}".encode(errors="surrogatepass"))
        try:
            out, reason = _outputs(place, limits, len(READY) + len(word) + 1)
        finally:
            _remove_all(place / "work")
    # Only what is ahead of the program writes there.
    if reason:
        raise UsageError(
            "programs of a model run in a sandbox alone, and this host gives none: "
            f"{reason.decode(errors='replace').strip()}; score them on a host with Linux 5.12 or "
            "newer that allows user namespaces, and mounts in them"
        )
    return out == READY + word.encode()


def _outputs(place: Path, limits: ProgramLimits, most: int) -> tuple[bytes, bytes]:
    """Run the program in `place`; return its report, of `most` bytes, and why it did not begin."""
    given = str(place), str(limits.seconds), str(limits.memory_bytes)
    with (place / "input").open("rb") as text:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(CHILD), *given],
            stdin=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=place / "work",
            env=library_paths(),
            start_new_session=True,
        )
    with child:
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            out = _read(child.stdout.fileno(), len(READY), STARTING_SECONDS)
            # Its clock begins when the sandbox is made.
            out += (
                _read(child.stdout.fileno(), most - len(READY), 2 * limits.seconds) if out else b""
            )
        finally:
            # The processes of its namespace end with it.
            child.kill()
        return out, b"" if out else child.stderr.read(LONGEST_REASON)


def _read(descriptor: int, most: int, seconds: float) -> bytes:
    """Read `most` bytes, or what comes until the end or within the time."""
    found, end = b"", time.monotonic() + seconds
    while len(found) < most:
        left = end - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            break
        more = os.read(descriptor, most - len(found))
        if not more:
            break
        found += more
    return found


def _remove_all(folder: Path) -> None:
    """Remove what a program left in `folder`: deeper than a path can be, or locked."""
    number = 0
    while paths := list(folder.iterdir()):
        for path in paths:
            if path.is_symlink() or not path.is_dir():
                path.unlink()
                continue
            path.chmod(0o700)
            for inner in path.iterdir():
                number += 1
                # Next to the others, under a name that no program made.
                inner.rename(folder / f"{secrets.token_hex(8)}-{number}")
            path.rmdir()


def score_programs(
    programs: Sequence[Sequence[str]],
    names: Sequence[str],
    comm: "MPI.Intracomm",
    limits: ProgramLimits = ProgramLimits(),
) -> Score:
    """Score problems by their sampled programs, each with its tests, by `names` such as pass@1.

    `programs`: of each problem; the same on all ranks, which share them out. Every rank calls it
    and gets the score. Raises UsageError on every rank where there is no sandbox, and for fewer
    samples than a metric needs.
    """
    every = [(number, text) for number, own in enumerate(programs) for text in own]
    passed = np.zeros(len(programs), np.int64)

    def run() -> None:
        for number, text in every[comm.rank :: comm.size]:
            passed[number] += passes(text, limits)

    on_all(comm, run)
    passed = comm.allreduce(passed)
    mine = list(range(comm.rank, len(programs), comm.size))
    samples = [len(programs[number]) for number in mine]
    return score_samples(samples, [int(passed[n]) for n in mine], names, comm, mine)
