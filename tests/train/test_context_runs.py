"""Runs whose ranks share the positions of sequences, compared with runs on one rank."""

import json
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.errors import LayoutError, RecipeError
from mpillm.system.console import Console
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train

QUIET = Console(speaks=False)
# Float32, of losses, norms and validation losses; each layout adds up in another order.
TOLERANCE = 1e-6
GPT2 = {
    "norm": "layernorm",
    "positions": "learned",
    "activation": "gelu",
    "bias": True,
    "width": 36,
    "dropout": 0.1,
    "embedding_dropout": 0.1,
}

pytestmark = pytest.mark.slow("trains whole runs, one for each layout")


def recipe(dataset: Path, run: Path, sections: dict[str, dict[str, object]]) -> Recipe:
    table: dict[str, dict[str, object]] = {
        # A context that 2, 3 and 4 ranks can cut.
        "model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 24},
        "data": {"path": str(dataset)},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "train": {"run": str(run), "sinks": [], "steps": 5, "batch": 4, "microbatch": 2, "keep": 1},
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section}
    return parse_recipe(table, "context")


def numbers(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss", "grad_norm", "validation_loss")
    return [line[key] for line in lines for key in kept if key in line]


def layouts(ranks: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = [{"context": ranks, "context_kind": "ring"}]
    if ranks == 2:
        found.append({"context": 2, "context_kind": "ulysses"})
    if ranks == 4:
        found += [{"context": 2, "data": 2}, {"context": 2, "pipeline": 2, "schedule": "zb-h1"}]
    return found


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"recompute": "full"}},
        {"model": GPT2},
        {"data": {"document_mask": True}, "model": {"window": 8, "full_every": 2}},
    ],
    ids=["llama", "gpt2", "documents"],
)
def test_losses_are_those_of_one_rank(
    data: Path, folder: Path, comm: MPI.Intracomm, sections: dict[str, dict[str, object]]
) -> None:
    alone = folder / "alone"
    if comm.rank == 0:
        train(recipe(data, alone, sections), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    for number, parallel in enumerate(layouts(comm.size)):
        run = folder / f"run{number}"
        train(recipe(data, run, {**sections, "parallel": parallel}), comm, QUIET)
        found, wanted = numbers(run), numbers(alone)
        assert len(found) == 11
        assert found == pytest.approx(wanted, rel=TOLERANCE), parallel


@pytest.mark.ranks(4)
def test_tensor_ranks_that_share_heads_of_keys_attend_in_a_ring(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    """Two ranks do not divide three heads: each names a head once for each head of queries."""
    heads = {"model": {"heads": 12, "kv_heads": 3, "width": 48}, "train": {"microbatch": 1}}
    if comm.rank == 0:
        train(recipe(data, folder / "alone", heads), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    parallel = {"context": 2, "tensor": 2, "debug": True}
    train(recipe(data, folder / "run", {**heads, "parallel": parallel}), comm, QUIET)
    found, wanted = numbers(folder / "run"), numbers(folder / "alone")
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_model_of_16_bits_learns_the_same(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    sections = {"train": {"dtype": "bfloat16", "steps": 5}}
    if comm.rank == 0:
        train(recipe(data, folder / "alone", sections), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    parallel = {"parallel": {"context": comm.size}}
    train(recipe(data, folder / "run", {**sections, **parallel}), comm, QUIET)
    found, wanted = numbers(folder / "run"), numbers(folder / "alone")
    assert found == pytest.approx(wanted, rel=5e-3)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"fixed_order": True, "microbatch": 1}}, "train.fixed_order gives"),
        ({"train": {"compile": True}}, "train.compile computes with whole sequences"),
        ({"train": {"noise_scale": 2}}, "train.noise_scale computes with whole sequences"),
        ({"model": {"context": 25}}, "a context of 25 positions cannot be cut"),
        ({"model": {"attention_dropout": 0.1}}, "attention_dropout = 0.1 drops"),
        (
            {"model": {"heads": 1, "kv_heads": 1}, "parallel": {"context_kind": "ulysses"}},
            'context_kind = "ulysses" exchanges heads',
        ),
    ],
)
def test_what_does_not_compose_is_refused_with_the_reason(
    data: Path,
    folder: Path,
    comm: MPI.Intracomm,
    sections: dict[str, dict[str, object]],
    words: str,
) -> None:
    if comm.size == 1:
        pytest.skip("one rank shares no sequence")
    parallel = {"parallel": {"context": comm.size, **sections.get("parallel", {})}}
    with pytest.raises((LayoutError, RecipeError), match=words):
        train(recipe(data, folder / "run", {**sections, **parallel}), comm, QUIET)
