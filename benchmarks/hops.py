"""Count the hops of four walks through mpillm: its own functions between two points of a step.

    mpirun -n 2 python benchmarks/hops.py

A hop is a function of mpillm that is entered on the way, counted once; comprehensions, resumed
generators and functions of other packages are left out. A tiny model is trained for three steps on
two ranks, and sys.setprofile records the second time that a walk is taken: the first one warms up.
"""

import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from mpi4py import MPI

import mpillm

# The one that runs: of the checkout with PYTHONPATH, else the installed one.
PACKAGE = str(Path(mpillm.__file__).parent)


@dataclass
class Walk:
    """The functions entered from the call of `first` to the end.

    The end is the entry of a function called `last`, of one that names an attribute of `calls` (a
    method of mpi4py leaves no event), or the call of the C function `last`.
    """

    title: str
    most: int
    """The most hops that the house allows."""
    before: int
    """The hops that a review counted before."""
    first: tuple[str, ...]
    last: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    skipped: int = 1
    """Times that the walk is taken before it is recorded."""
    hops: dict[str, str] = field(default_factory=dict)
    """Function → its file, in the order of entry."""
    state: str = "waiting"

    def see(self, event: str, frame: FrameType, argument: Any) -> None:
        """Take one event of sys.setprofile."""
        code = frame.f_code
        if self.state == "done":
            return
        if event == "c_call":
            name = getattr(argument, "__qualname__", "")
            if self.state == "recording" and name in self.last:
                self._end()
            return
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        name = code.co_qualname
        if self.state != "done" and name in self.first:
            # The last beginning before the end counts: most gradients complete no bucket.
            self.hops.clear()
            self.state = "recording"
        if self.state != "recording" or name.rpartition(".")[2].endswith("comp>"):
            return
        if not name.endswith("<genexpr>"):
            self.hops.setdefault(name, str(Path(code.co_filename).relative_to(PACKAGE)))
        if name in self.last or set(self.calls).intersection(code.co_names):
            self._end()

    def _end(self) -> None:
        self.skipped -= 1
        self.state = "done" if self.skipped < 0 else "waiting"

    def print_chain(self) -> bool:
        """Print the chain of names; return whether it is short enough."""
        files = len(set(self.hops.values()))
        verdict = "" if len(self.hops) <= self.most else ": too many"
        print(
            f"\n{self.title}: {len(self.hops)} hops in {files} files "
            f"(before {self.before}, at most {self.most}){verdict}"
        )
        for number, (name, file) in enumerate(self.hops.items(), 1):
            print(f"  {number:2d}  {name}  ({file})")
        if self.state != "done":
            print(f"  the walk did not end ({self.state}): {self.first} → {self.last}")
        return self.state == "done" and not verdict


def record(walks: list[Walk], work: Callable[[], None]) -> None:
    """Run `work` with the walks watching."""

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        for walk in walks:
            walk.see(event, frame, argument)

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)


def write_documents(folder: Path) -> None:
    """Write 200 documents of made-up words."""
    folder.mkdir()
    chance = random.Random(7)
    for number in range(200):
        words = ["".join(chance.choices("etaoin", k=4)) for _ in range(60)]
        (folder / f"{number:03d}.txt").write_text(" ".join(words))


def train_steps(data: Path, run: Path, walks: list[Walk], **sections: dict[str, object]) -> None:
    """Train three steps of a tiny model under the profile, and save. Every rank calls it."""
    from mpillm.system.console import Console
    from mpillm.train.recipe import parse_recipe
    from mpillm.train.setup import train

    table: dict[str, dict[str, object]] = {
        "model": {"layers": 2, "width": 32, "heads": 2, "context": 32},
        "data": {"path": str(data)},
        "train": {"run": str(run), "steps": 3, "batch": 8, "microbatch": 2},
        **sections,
    }
    recipe = parse_recipe(table, "hops")
    record(walks, lambda: train(recipe, MPI.COMM_WORLD, Console(speaks=False)))


def main() -> None:
    comm = MPI.COMM_WORLD
    if comm.size != 2:
        sys.exit("the walks are counted on two ranks: mpirun -n 2 python benchmarks/hops.py")
    # Imported before the profile is set: an import would be counted as a hop.
    from mpillm.system.console import Console
    from mpillm.tokens import sampler
    from mpillm.tokens.prepare import PrepareOptions, prepare

    # The profile slows reads down, and slow reads are asked for ahead: not on the way of a batch.
    sampler.COLD_SECONDS = float("inf")
    batch = Walk(
        "batch: from file to loss",
        20,
        33,
        ("Trainer.step",),
        ("CrossEntropyTask.objective_sum",),
    )
    save = Walk(
        "checkpoint: from tensor to file",
        14,
        23,
        ("TrainingLoop._save",),
        ("pwrite", "pwritev", "write", "BufferedWriter.write"),
        skipped=0,
    )
    gradient = Walk(
        "gradient: from autograd's hook to the wire",
        8,
        16,
        ("ReplicatedGradients.ready",),
        calls=("_send", "Isend", "Send_init"),
        # About 20 buckets a step: the second step reuses the scratch memory of the first.
        skipped=30,
    )
    message = Walk(
        "pipeline: from action to message",
        8,
        14,
        ("_RowExecution._pass_on",),
        calls=("try_send", "Isend"),
    )
    with tempfile.TemporaryDirectory(prefix="mpillm-hops-") as name:
        folder = Path(comm.bcast(name))
        if comm.rank == 0:
            write_documents(folder / "documents")
        comm.Barrier()
        options = PrepareOptions(
            (str(folder / "documents"),), folder / "data", tokenizer="bytes", validation=0.1
        )
        prepare(options, comm, Console(speaks=False))
        train_steps(folder / "data", folder / "data-run", [batch, save])
        ring = {"allreduce": "ring", "overlap": "during", "bucket_bytes": 4096}
        train_steps(folder / "data", folder / "ring-run", [gradient], parallel=ring)
        train_steps(folder / "data", folder / "pipeline-run", [message], parallel={"pipeline": 2})
        comm.Barrier()
    walks = (batch, message, save, gradient)
    if comm.rank == 0:
        short = [walk.print_chain() for walk in walks]
        print(json.dumps({walk.title: len(walk.hops) for walk in walks}))
        if not all(short):
            print("some walks are longer than they should be")


if __name__ == "__main__":
    main()
