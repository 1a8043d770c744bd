"""Compare every layout of few ranks with one process: losses, norms, and each other's checkpoints.

    mpirun -n 4 --map-by :OVERSUBSCRIBE python benchmarks/parity.py [--steps 20 --every 1]
    mpirun -n 4 --map-by :OVERSUBSCRIBE python benchmarks/parity.py --checkpoints
    sh tests/fixtures/two_hosts.sh --ranks-per-host 2 python benchmarks/parity.py --only zero

The layouts are all products of the ranks over data, pipeline, context and tensor, times ZeRO 0 to 3
where ranks share tokens, recomputation, dtype, and two kinds of model; data × pipeline × ZeRO in a
fixed order, too, whose losses have the bits of one process. `--checkpoints`: twelve layouts, each
of which reads what each has written, and writes it again: 144 pairs, whose bits are the same.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from mpillm.infer.loading import open_of, read_vocabulary
from mpillm.parallel.step_plan import Precision, make_mesh
from mpillm.system.console import Console
from mpillm.tasks.task_catalog import make_task
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.train.recipe import parse_recipe
from mpillm.train.run_plan import fill_model, plan_run
from mpillm.train.step import Trainer
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.names import name_tensors
from mpillm.weights.saving import save

AXES = ("data", "pipeline", "context", "tensor")
MODELS: dict[str, dict[str, Any]] = {
    # Three ranks divide the heads, and not those of keys and values.
    "llama": {"kv_heads": 4},
    "gpt2": {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True},
}
CONTEXT = 24
# A norm differs more than a loss: it follows the small gradients, whose errors grow with the steps.
NORM_FACTOR = 10
# Relative difference of a loss at any step, in float32 of a norm over NORM_FACTOR, too.
LARGEST = {"float32": 1e-4, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Case:
    """A layout with the rest of its settings."""

    sizes: tuple[int, ...]
    """Of AXES, in their order."""
    zero: int
    recompute: str
    dtype: str
    model: str
    fixed: bool

    @property
    def layout(self) -> dict[str, Any]:
        given = dict(zip(AXES, self.sizes, strict=True))
        return {**given, "zero": self.zero}

    def __str__(self) -> str:
        axes = " × ".join(f"{name}={n}" for name, n in zip(AXES, self.sizes, strict=True) if n > 1)
        words = [axes or "one rank", f"zero {self.zero}", self.dtype, self.model]
        words += ["recompute"] * (self.recompute == "full")
        return ", ".join(words + ["fixed order"] * self.fixed)


def factorisations(ranks: int) -> list[tuple[int, ...]]:
    """List the ways to write `ranks` as a product over AXES."""
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    found = itertools.product(divisors, repeat=len(AXES))
    return [sizes for sizes in found if math.prod(sizes) == ranks]


def all_cases(ranks: int) -> list[Case]:
    """List every legal case of `ranks` ranks."""
    found = []
    others = itertools.product(("none", "full"), LARGEST, MODELS)
    for sizes, (recompute, dtype, model) in itertools.product(factorisations(ranks), others):
        data, _, context, tensor = sizes
        stages = range(4) if data * context > 1 else (0,)
        # Three data ranks have no power of two of microbatches; bfloat16 adds nothing to bits.
        fixes = context * tensor == 1 and data != 3 and dtype == "float32"
        for zero, fixed in itertools.product(stages, (False, True) if fixes else (False,)):
            found.append(Case(sizes, zero, recompute, dtype, model, fixed))
    return found


def covering(cases: Sequence[Case]) -> list[Case]:
    """Choose cases until each pair of values of two settings is in one of them.

    Greedy, in the order of `cases`: the same choice on all ranks and in each run.
    """

    def pairs(case: Case) -> set[tuple[Any, ...]]:
        values = list(enumerate(vars(case).values()))
        return set(itertools.combinations(values, 2))

    left = set().union(*map(pairs, cases))
    chosen = []
    while left:
        best = max(cases, key=lambda case: len(pairs(case) & left))
        left -= pairs(best)
        chosen.append(best)
    return chosen


def batch_of(ranks: int) -> int:
    """Return the sequences of a batch that `ranks` ranks can share."""
    return 12 if ranks == 3 else 8


@contextmanager
def trainer_of(case: Case, data: Path, comm: MPI.Intracomm, batch: int) -> Iterator[Trainer]:
    """Make the trainer of a case, without a folder of a run. Every rank of `comm` calls it."""
    table = {
        "model": {"layers": 4, "width": 48, "heads": 12, "context": CONTEXT, **MODELS[case.model]},
        "data": {"path": str(data)},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 4},
        "train": {
            "run": "unused",
            "steps": 20,
            "batch": batch,
            "microbatch": 1,
            "recompute": case.recompute,
            "fixed_order": case.fixed,
        },
        "parallel": case.layout,
    }
    manifest = Manifest.load(data)
    recipe = parse_recipe(table, "parity")
    vocabulary = read_vocabulary(manifest, comm)
    task = make_task(recipe.task.name, recipe.task, vocabulary, Lengths.of(recipe.model))
    recipe = fill_model(recipe, task.model_settings(vocabulary))
    mesh = make_mesh(comm, recipe.parallel, recipe.model, batch)
    plan = replace(plan_run(recipe, mesh.sizes), precision=Precision("cpu", case.dtype))
    with open_of(manifest, "train") as reader:
        trainer = Trainer(recipe, task, reader, mesh, plan)
        try:
            yield trainer
        finally:
            trainer.close()
            mesh.free()


def numbers(case: Case, data: Path, comm: MPI.Intracomm, steps: int, batch: int) -> list[float]:
    """Return the losses and norms of a case's steps. Every rank of `comm` calls it."""
    with trainer_of(case, data, comm, batch) as trainer:
        results = [trainer.step(step) for step in range(steps)]
    return [value for result in results for value in (result.loss, result.grad_norm)]


def difference(case: Case, data: Path, comm: MPI.Intracomm, steps: int, known: dict) -> float:
    """Return the largest relative difference of a case from one process.

    `known`: the numbers of one process so far. Every rank of `comm` calls it.
    """
    batch, key = batch_of(comm.size), (case.dtype, case.model, case.fixed)
    if key not in known:
        alone = replace(case, sizes=(1,) * len(AXES), zero=0, recompute="none")
        # The other ranks would compute the same.
        found = numbers(alone, data, MPI.COMM_SELF, steps, batch) if comm.rank == 0 else None
        known[key] = comm.bcast(found)
    pairs = zip(numbers(case, data, comm, steps, batch), known[key], strict=True)
    found = [abs(one - other) / abs(other) for one, other in pairs]
    if case.dtype != "float32":
        # The losses alone: a norm of 16-bit gradients follows the last bits of each.
        return max(found[::2])
    return max(max(found[::2]), max(found[1::2]) / NORM_FACTOR)


def is_right(case: Case, found: float) -> bool:
    return found == 0 if case.fixed else found <= LARGEST[case.dtype]


def twelve(ranks: int) -> list[Case]:
    """Choose twelve layouts whose checkpoints are exchanged."""
    cases = [
        case
        for case in all_cases(ranks)
        if (case.recompute, case.dtype, case.model, case.fixed)
        == ("none", "float32", "llama", False)
    ]
    count = min(12, len(cases))
    return [cases[number * len(cases) // count] for number in range(count)]


def tensors(trainer: Trainer) -> dict[str, Any]:
    state, slots = trainer.optimizer.state, trainer.recipe.optimizer.slots
    return name_tensors(trainer.stepped, trainer.stepped, state, slots, trainer.held)


def whole(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint."""
    found = {
        name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for name, entry in checkpoint.tensors.items()
    }
    checkpoint.load(found)
    return found


def exchange(cases: Sequence[Case], folder: Path, data: Path, comm: MPI.Intracomm) -> int:
    """Write a checkpoint in each layout, and read it in each; return the pairs that differ."""
    batch, wrong = batch_of(comm.size), 0
    facts = {"step": 2, "recipe": {}}
    for number, case in enumerate(cases):
        with trainer_of(case, data, comm, batch) as trainer:
            for step in range(2):
                trainer.step(step)
            save(folder / f"of-{number}", tensors(trainer), facts, {}, comm)
    for reader, case in enumerate(cases):
        with trainer_of(case, data, comm, batch) as trainer:
            for writer in range(len(cases)):
                given = Checkpoint(folder / f"of-{writer}" / "step-00000002")
                given.load(tensors(trainer))
                trainer.model.gradients.updated()
                again = folder / f"again-{writer}-{reader}"
                save(again, tensors(trainer), facts, {}, comm)
                if comm.rank == 0:
                    one, two = whole(given), whole(Checkpoint(again / "step-00000002"))
                    same = one.keys() == two.keys() and all(
                        torch.equal(one[name], two[name]) for name in one
                    )
                    wrong += not same
    return int(comm.bcast(wrong))


def prepared(folder: Path, comm: MPI.Intracomm) -> Path:
    """Prepare a dataset of mpillm's own sources. Every rank calls it."""
    if comm.rank == 0:
        sources = sorted(Path(__file__).parents[1].glob("mpillm/parallel/**/*.py"))
        text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
        (folder / "sources.txt").write_text(text)
    comm.Barrier()
    options = PrepareOptions((str(folder / "sources.txt"),), folder / "data", tokenizer="bytes")
    prepare(options, comm, Console(speaks=False))
    return folder / "data"


def compare(cases: Sequence[Case], data: Path, comm: MPI.Intracomm, steps: int) -> dict[str, float]:
    """Train each case; print those that differ. Every rank calls it."""
    known: dict = {}
    found, begun = {}, time.monotonic()
    for number, case in enumerate(cases):
        found[str(case)] = difference(case, data, comm, steps, known)
        if comm.rank == 0 and not is_right(case, found[str(case)]):
            print(f"WRONG {case}: {found[str(case)]:.1e}", flush=True)
        if comm.rank == 0 and (number + 1) % 25 == 0:
            seconds = time.monotonic() - begun
            print(f"{number + 1} of {len(cases)} after {seconds:.0f} s", flush=True)
    return found


def main() -> None:
    comm = MPI.COMM_WORLD
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=1, help="take every n-th case alone")
    parser.add_argument("--covering", action="store_true", help="cases that cover all pairs alone")
    parser.add_argument("--only", default="", help="cases whose name has this word alone")
    parser.add_argument("--checkpoints", action="store_true", help="exchange checkpoints")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(comm.bcast(made))
        data = prepared(folder, comm)
        if options.checkpoints:
            cases = twelve(comm.size)
            wrong = exchange(cases, folder, data, comm)
            if comm.rank == 0:
                print(f"{len(cases)} layouts, {len(cases) ** 2} pairs, {wrong} differ")
            comm.Barrier()
            sys.exit(1 if wrong else 0)
        cases = all_cases(comm.size)
        cases = [case for case in cases if options.only in str(case)]
        cases = covering(cases) if options.covering else cases[:: options.every]
        found = compare(cases, data, comm, options.steps)
        comm.Barrier()
    wrong = sum(not is_right(case, found[str(case)]) for case in cases)
    if comm.rank == 0:
        for dtype in LARGEST:
            free = [found[str(c)] for c in cases if c.dtype == dtype and not c.fixed]
            if free:
                print(f"{dtype}: {len(free)} cases, largest difference {max(free):.1e}")
        fixed = [case for case in cases if case.fixed]
        print(f"fixed order: {len(fixed)} cases; {comm.size} ranks, {wrong} cases are wrong")
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
