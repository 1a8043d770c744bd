"""Run programs that a model wrote, each with its tests, and score those that pass (pass@k).

A program runs in a process of its own: see sandbox_child.py. What it may do is bounded by the
kernel, and not by what it looks like.
"""

import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpillm.comm.failure import on_all
from mpillm.errors import UsageError
from mpillm.infer.scores.score import Score
from mpillm.infer.scores.score_texts import score_samples
from mpillm.system.environment import library_paths

if TYPE_CHECKING:
    from mpi4py import MPI

CHILD = Path(__file__).with_name("sandbox_child.py")
# To start Python on a slow file system, beyond the program's own time.
STARTING_SECONDS = 10.0


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
    with tempfile.TemporaryDirectory(prefix="mpillm-program-") as folder:
        given = folder, str(limits.seconds), str(limits.memory_bytes)
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(CHILD), *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=library_paths(),
            start_new_session=True,
        )
        try:
            text = f"{word}\n{program}".encode(errors="surrogatepass")
            out, reason = child.communicate(text, STARTING_SECONDS + 2 * limits.seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return False
    # Only what is ahead of the program writes there.
    if reason:
        raise UsageError(
            "programs of a model run in a sandbox alone, and this host gives none: "
            f"{reason.decode(errors='replace').strip()}; score them on a host with Linux 5.13 or "
            "newer that allows user namespaces"
        )
    return out == word.encode()


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
