"""Whole runs of each optimizer: in each layout as on one rank, and resumed bit for bit."""

import io
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpillm.comm.mesh import Mesh
from mpillm.errors import LayoutError, MismatchError, RecipeError
from mpillm.models.decoder import DecoderConfig
from mpillm.parallel.pipeline.stage import Batch
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.parallel.step_plan import plan_step
from mpillm.system.console import Console
from mpillm.tasks.causal_lm import CausalLM
from mpillm.train.optimizers.optimizer import GroupRule, make_optimizer, set_rate
from mpillm.train.optimizers.optimizer_catalog import OPTIMIZERS, optimizer_class
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train
from mpillm.weights.finding import find
from mpillm.weights.names import name_tensors

QUIET = Console(speaks=False)
STEPS = 4
RULES = (GroupRule("embedding.*", rate=0.3, decay=0.0), GroupRule("*norm*", rate=2.0))
# A rate that does not depend on the number of steps, so that a resumed run can be compared.
STEADY = {
    "schedule": "constant-then-decay",
    "decay_share": 0.0,
    "warmup_steps": 2,
    "clip_value": 0.01,
    "groups": [asdict(rule) for rule in RULES],
}


def recipe(dataset: Path, run: Path, name: str, **sections: dict[str, object]) -> Recipe:
    rate = optimizer_class(name)().learning_rate
    table: dict[str, dict[str, object]] = {
        "model": {"layers": 4, "width": 16, "heads": 2, "context": 16, "bias": True},
        "data": {"path": str(dataset)},
        "optimizer": {"name": name, "learning_rate": rate, **STEADY},
        "train": {
            "run": str(run),
            "sinks": [],
            "steps": STEPS,
            "batch": 12,
            "microbatch": 1,
            "fixed_order": True,
            "save_every": STEPS // 2,
        },
    }
    for section, keys in sections.items():
        table[section] = {**table.get(section, {}), **keys}
    return parse_recipe(table, "test")


def metrics(run: Path) -> list[tuple[float, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def hashes(run: Path, comm: MPI.Intracomm) -> dict[str, list[str]]:
    tensors = find(run, comm, QUIET).tensors
    return {name: [piece.xxh3_128 for piece in entry.pieces] for name, entry in tensors.items()}


SPEC = DecoderConfig(layers=4, width=16, heads=2, context=16, vocab_size=40, bias=True)
RATES = [0.5, 1.0, 0.7]


def stepped(
    comm: MPI.Intracomm, name: str, data_ranks: int, schedule: str, exact: bool
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Step over one batch; return the losses, the norms, and this rank's weights and state."""
    settings = optimizer_class(name)(groups=RULES)
    pipeline = comm.size // data_ranks
    parallel = ParallelSettings(pipeline=pipeline, schedule=schedule)
    mesh = Mesh(comm, {"data": data_ranks, "pipeline": pipeline})
    plan = plan_step(SPEC, parallel, data_ranks, 12, 1, fixed_order=exact)
    model = ShardedModel(SPEC, CausalLM(), 1, mesh, plan, parallel)
    optimizer = make_optimizer(settings, model.named_weights())
    ids = torch.randint(40, (12, 17), generator=torch.Generator().manual_seed(9))
    own = ids[mesh.axis("data").rank * plan.rows :][: plan.rows]
    pieces = [{"ids": own[a:b, :-1], "targets": own[a:b, 1:]} for a, b in plan.bounds]
    losses, norms = [], []
    for rate in RATES:
        passes = model.train(Batch(pieces, 12 * 16))
        losses.append(math.fsum(loss for part in comm.allgather(passes.losses) for loss in part))
        norms.append(model.clip_(0.5, max_value=0.01))
        set_rate(optimizer, rate * settings.learning_rate)
        optimizer.step()
    weights = model.named_weights()
    found = name_tensors(weights, weights, optimizer.state, settings.slots)
    model.close()
    return losses, norms, {key: tensor.detach().clone() for key, tensor in found.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_layout_has_the_numbers_of_one_rank(comm: MPI.Intracomm, name: str) -> None:
    """Bit for bit, where the sequences of a rank are a branch of one tree; else within 1e-5."""
    losses, norms, tensors = stepped(MPI.COMM_SELF, name, 1, "1f1b", exact=True)
    assert losses[-1] < losses[0]
    layouts = [(1, "1f1b"), (comm.size, "1f1b")] if comm.size > 1 else []
    for data_ranks, schedule in layouts + [(2, "zb-v")] * (comm.size == 4):
        own = 12 // data_ranks
        exact = data_ranks == 1 or own & (own - 1) == 0
        found = stepped(comm, name, data_ranks, schedule, exact)
        if exact:
            assert found[:2] == (losses, norms), (data_ranks, schedule)
            assert all(torch.equal(tensor, tensors[key]) for key, tensor in found[2].items())
        else:
            assert found[0] == pytest.approx(losses, rel=1e-5), (data_ranks, schedule)


@pytest.mark.slow("trains three runs of each optimizer")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_bitwise_the_undisturbed_one(
    data: Path, folder: Path, comm: MPI.Intracomm, name: str
) -> None:
    """Half of the steps on one rank, the others on all of them, in a pipeline."""
    run, alone = folder / "run", folder / "alone"
    whole = recipe(data, run, name, train={"batch": 4})
    if comm.rank == 0:
        train(recipe(data, alone, name, train={"batch": 4}), MPI.COMM_SELF, QUIET)
        half = replace(whole, train=replace(whole.train, steps=STEPS // 2))
        train(half, MPI.COMM_SELF, QUIET)
    comm.Barrier()
    printed = io.StringIO()
    rest = replace(whole, parallel=replace(whole.parallel, pipeline=comm.size))
    train(rest, comm, Console(comm.rank == 0, printed), resume=True)
    expected = metrics(alone)
    assert len(expected) == STEPS
    assert metrics(run) == expected
    assert hashes(run, comm) == hashes(alone, comm)
    if comm.rank == 0:
        changed = [line for line in printed.getvalue().splitlines() if " was " in line]
        assert {line.partition(" ")[0] for line in changed} <= {"train.steps", "parallel.pipeline"}


def test_another_optimizer_is_refused(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    run = folder / "run"
    train(recipe(data, run, "lion", train={"steps": 1, "fixed_order": False}), comm, QUIET)
    other = recipe(data, run, "adafactor", train={"fixed_order": False})
    with pytest.raises(MismatchError, match=r"optimizer\.name was 'lion' and is 'adafactor'"):
        train(other, comm, QUIET, resume=True)


def test_a_rule_is_checked_against_the_whole_model_on_every_rank(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    """A rank of a pipeline holds the rule's weights, the others do not."""
    parallel = {"pipeline": comm.size}
    rules = {"groups": [{"match": "embedding.*"}, {"match": "layers.3.*.bias"}]}
    good = recipe(
        data, folder / "good", "sgd", optimizer=rules, parallel=parallel, train={"steps": 1}
    )
    train(good, comm, QUIET)
    rules = {"groups": [{"match": "layers.4.*"}]}
    with pytest.raises(
        RecipeError, match=r"groups\[0\]\.match = 'layers\.4\.\*' matches no weight"
    ):
        train(recipe(data, folder / "bad", "sgd", optimizer=rules, parallel=parallel), comm, QUIET)
    assert not (folder / "bad").exists()


def test_the_noise_scale_is_a_metric_of_every_nth_step(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    for name, every in (("on", 2), ("off", 0)):
        table = {"noise_scale": every, "steps": 4, "fixed_order": False}
        train(recipe(data, folder / name, "adamw", train=table), comm, QUIET)
    assert metrics(folder / "on") == metrics(folder / "off")
    lines = map(json.loads, (folder / "on" / "metrics.jsonl").read_text().splitlines())
    found = {line["step"]: line["noise_scale"] for line in lines if "noise_scale" in line}
    assert set(found) <= {2, 4}
    assert all(value > 0 for value in found.values())
    assert found
    if comm.size == 1:
        table = {"noise_scale": 1, "microbatch": 0, "fixed_order": False}
        with pytest.raises(LayoutError, match=r"set train\.microbatch to one of 1, 2, 3, 4, 6"):
            train(recipe(data, folder / "bad", "adamw", train=table), comm, QUIET)
        assert not (folder / "bad").exists()


def test_a_run_without_a_restart_is_said(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    printed = io.StringIO()
    restarts = {"schedule": "cosine-restarts", "period": 100}
    table = {"steps": 3, "fixed_order": False}
    run = recipe(data, folder / "run", "adamw", optimizer=restarts, train=table)
    train(run, comm, Console(comm.rank == 0, printed))
    if comm.rank == 0:
        words = "the first cycle of cosine-restarts ends at step 102 and train.steps = 3"
        assert words in " ".join(printed.getvalue().split())
