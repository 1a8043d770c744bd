"""Runs on a host whose /dev/shm is too small: each says so once, and has the same losses."""

import re
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.system.console import Console
from mpillm.train.recipe import parse_recipe
from mpillm.train.setup import train
from tests.namespaces import namespace
from tests.train.run_results import metrics

# Room for the buffers of three teams of two ranks, 1 MiB each, and for nothing larger. Along the
# context axis a run has three of them, with `zero` two: for sums, and for the gathers of weights.
SHM = 3500 << 10
SETTINGS: dict[str, dict[str, object]] = {
    "model": {"layers": 4, "width": 128, "heads": 4, "context": 128},
    "optimizer": {"warmup_steps": 1},
    "parallel": {"context_kind": "ring"},
    "train": {"steps": 2, "batch": 16},
}
LAYOUTS = {
    "zero": (3, "are gathered layer by layer instead of once a host"),
    "tensor": (2, "the ranks of the tensor axis send messages"),
    "context": (2, "the ranks of the context axis send keys and values as messages"),
}
# One start of two ranks trains all of them.
PROGRAM = """
import sys
from pathlib import Path
from mpi4py import MPI
from mpillm.system.console import Console
from mpillm.train.recipe import load_recipe
from mpillm.train.setup import train

comm, console = MPI.COMM_WORLD, Console(MPI.COMM_WORLD.rank == 0, watched=False)
for axis in sys.argv[2:]:
    console.say(f"layout {axis}")
    changes = [f"parallel.{axis}", f"train.run={Path(sys.argv[1]).parent / axis.split('=')[0]}"]
    train(load_recipe(Path(sys.argv[1]), changes, lambda text: None), comm, console)
"""


@pytest.mark.slow("two processes that load torch and train three layouts")
def test_each_user_of_shared_memory_says_once_what_it_does_instead(
    data: Path, tmp_path: Path, python: Any
) -> None:
    before = namespace(f"mount -t tmpfs -o size={SHM} tmpfs /dev/shm")
    sections = {**SETTINGS, "data": {"path": str(data)}}
    alone = {**sections, "train": {**SETTINGS["train"], "run": str(tmp_path / "alone")}}
    train(parse_recipe(alone, "test"), MPI.COMM_SELF, Console(speaks=False))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "".join(
            f"[{name}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in keys.items())
            for name, keys in sections.items()
        )
    )
    wanted = [f"{axis}={value}" for axis, (value, _) in LAYOUTS.items()]
    # Open MPI's own segments would fill the little that there is.
    elsewhere = {"OMPI_MCA_btl_sm_backing_directory": str(tmp_path)}
    done = python("-c", PROGRAM, recipe, *wanted, ranks=2, before=before, **elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = done.stdout.split("layout ")[1:]
    for part, (axis, (_, instead)) in zip(parts, LAYOUTS.items(), strict=True):
        warnings = [line for line in part.splitlines() if line.startswith("warning: rank ")]
        found = [line for line in warnings if instead in line]
        assert len(found) == 1, part
        assert "bytes of shared memory in /dev/shm: " in found[0]
        numbers = re.search(r"allocate ([\d,]+) bytes.*: ([\d,]+) are free; ", found[0])
        assert numbers, found[0]
        wanted_bytes, free = (int(text.replace(",", "")) for text in numbers.groups())
        assert free < wanted_bytes
        # No other user says the same twice.
        assert len({line.rpartition("; ")[2] for line in warnings}) == len(warnings)
        for one, other in zip(
            metrics(tmp_path / "alone", "loss"), metrics(tmp_path / axis, "loss"), strict=True
        ):
            assert one == pytest.approx(other, rel=1e-4)


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
