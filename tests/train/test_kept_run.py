"""A run that an earlier release began is resumed: the losses are those of that release.

Data and checkpoint are those of tests/tokens/data_0_1 and tests/weights/data_0_1, written by commit
9d0769a on 2 ranks. The same commit resumed it on one rank and gave LOSSES; on two ranks they agree
within 1e-7.
"""

import json
import shutil
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.system.console import Console
from mpillm.train.recipe import parse_recipe
from mpillm.train.setup import train

TESTS = Path(__file__).parents[1]
DATA = TESTS / "tokens" / "data_0_1"
CHECKPOINT = TESTS / "weights" / "data_0_1" / "step-00000004"
LOSSES = {
    5: 5.245762348175049,
    6: 5.150529384613037,
    7: 5.081215858459473,
    8: 5.048381328582764,
}


@pytest.mark.ranks(1, 2, 4)  # 3 ranks cannot share a batch of 4 sequences
def test_the_losses_are_those_of_the_release_that_began_it(
    folder: Path, comm: MPI.Intracomm
) -> None:
    run = folder / "run"
    if comm.rank == 0:
        shutil.copytree(CHECKPOINT, run / "checkpoints" / CHECKPOINT.name)
    comm.Barrier()
    facts = json.loads((CHECKPOINT / "index.json").read_text())["facts"]
    table = dict(facts["recipe"])
    table["data"] = {"path": str(DATA)}
    table["train"] = {**table["train"], "run": str(run), "steps": 8}
    train(parse_recipe(table, "kept"), comm, Console(speaks=False), resume=True)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    # Not bitwise: processors differ in the order in which their vector units sum.
    assert losses == pytest.approx(LOSSES, rel=1e-6)
