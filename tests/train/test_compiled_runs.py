"""Compiled runs have the losses of the others, and are refused where nothing can be compiled."""

import json
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.errors import RecipeError
from mpillm.system.compile_cache import find_compiler
from mpillm.system.console import Console
from mpillm.train import setup
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train

QUIET = Console(speaks=False)


def recipe(data: Path, run: Path, **settings: object) -> Recipe:
    table = {
        "model": {"layers": 2, "width": 32, "heads": 4, "context": 32},
        "data": {"path": str(data)},
        "optimizer": {"warmup_steps": 1},
        "train": {"run": str(run), "sinks": [], "steps": 4, "batch": 12, **settings},
    }
    return parse_recipe(table, "test")


def losses_of(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [value for line in lines for key, value in line.items() if key.endswith("loss")]


def test_without_a_compiler_it_is_refused(
    data: Path, folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "find_compiler", lambda: "")
    with pytest.raises(RecipeError, match=r"needs a C\+\+ compiler on each host"):
        train(recipe(data, folder / "run", compile=True, device="cpu"), comm, QUIET)


@pytest.mark.parametrize(
    ("section", "key", "value", "reason"),
    [
        ("data", "document_mask", True, "document_mask = true cuts each batch otherwise"),
        ("train", "recompute", "attention", "computes a part of it again"),
    ],
)
def test_what_does_not_compile_is_refused(
    data: Path,
    folder: Path,
    comm: MPI.Intracomm,
    section: str,
    key: str,
    value: object,
    reason: str,
) -> None:
    table: dict[str, dict[str, object]] = {
        "model": {"layers": 2, "width": 32, "heads": 4, "context": 32},
        "data": {"path": str(data)},
        "train": {"run": str(folder / "run"), "sinks": [], "compile": True, "batch": 12},
    }
    table[section][key] = value
    with pytest.raises(RecipeError, match=reason):
        train(parse_recipe(table, "test"), comm, QUIET)


@pytest.mark.slow("compiles")
@pytest.mark.skipif(not find_compiler(), reason="needs a C++ compiler")
@pytest.mark.usefixtures("processes")
def test_compiled_losses_are_the_others(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    """At one rank: a compiler starts processes, and each rank would need a minute."""
    train(recipe(data, folder / "plain"), comm, QUIET)
    said: list[str] = []
    console = Console(speaks=False)
    console.warn = said.append  # type: ignore[method-assign]
    train(recipe(data, folder / "compiled", compile=True), comm, console)
    assert said == []
    assert losses_of(folder / "compiled") == pytest.approx(losses_of(folder / "plain"), rel=1e-5)
