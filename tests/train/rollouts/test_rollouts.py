"""GRPO from records to a model that earns more: rewards, layouts, a resume, and wrong input."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.errors import MismatchError, MpillmError
from mpillm.infer.print_evaluation import print_evaluation
from mpillm.system.console import Console
from mpillm.train.recipe import parse_recipe
from mpillm.train.rollouts.rollouts import prompt_numbers
from mpillm.train.setup import train
from tests.tokens.chat.templates import say
from tests.train.test_preference_runs import MODEL, QUIET, WORDS, Sets, losses, write

HERE = "tests.train.rollouts.test_rollouts"
RIGHT = "well"


def nothing(prompt: str, answer: str, reference: str) -> float:
    return float("nan")


def ends_well(prompt: str, answer: str, reference: str) -> float:
    assert "assistant" in prompt
    assert reference == RIGHT
    return float(answer.endswith(RIGHT))


def run(
    sets: Sets, folder: Path, comm: MPI.Intracomm, resume: bool = False, **more: Any
) -> list[dict[str, Any]]:
    """Train, and return the lines of metrics.jsonl."""
    table: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "task": {"name": "grpo", "group": 6, "answer_tokens": 4, "temperature": 0.9, "top_p": 0.99},
        "optimizer": {"learning_rate": 0.005, "warmup_steps": 1},
        "data": {"path": str(sets.data("asked"))},
        "train": {
            "run": str(folder),
            "steps": 3,
            "batch": 24,
            "sinks": [],
            "start_from": str(sets.start),
        },
    }
    if more.get("task", {}).get("name", "grpo") != "grpo":
        table["task"] = {}
    table = {name: {**keys, **more.get(name, {})} for name, keys in table.items()}
    table["parallel"] = more.get("parallel", {})
    train(parse_recipe(table, "r"), comm, QUIET, resume=resume)
    return lines_of(folder)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def steps_of(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if "loss" in line]


@pytest.fixture(scope="session")
def sets(shared_folder: Path, comm: MPI.Intracomm) -> Sets:
    """Conversations with any of four answers, and prompts of which one answer is right."""
    made = Sets(shared_folder / "rollouts")
    if comm.rank == 0:
        draw = random.Random(5)
        prompts = [" ".join(draw.sample(WORDS, draw.randint(1, 4))) for _ in range(80)]
        for name in ("chats", "asked"):
            answers = [draw.choice(["well", "hello", "you", "are"]) for _ in prompts]
            answers = answers if name == "chats" else [RIGHT] * len(prompts)
            records = [{"messages": say(*each)} for each in zip(prompts, answers, strict=True)]
            write(made.folder / name, records, task="chat")
        table = {
            "task": {"name": "chat"},
            "data": {"path": str(made.data("chats"))},
            "train": {"steps": 60, "batch": 12, "start_from": ""},
            "optimizer": {"learning_rate": 0.01},
        }
        run(made, made.start, MPI.COMM_SELF, **table)
    comm.Barrier()
    return made


# Twice as many updates as steps, and a microbatch that is no whole group.
TWICE = {"task": {"updates": 2}, "train": {"microbatch": 4}}


@pytest.fixture(scope="session")
def alone(sets: Sets, comm: MPI.Intracomm) -> list[dict[str, Any]]:
    """The metrics of one rank."""
    if comm.rank == 0:
        run(sets, sets.folder / "alone", MPI.COMM_SELF, **TWICE)
    comm.Barrier()
    return lines_of(sets.folder / "alone")


def test_the_reward_rises(sets: Sets, folder: Path, comm: MPI.Intracomm) -> None:
    more = {"steps": 26, "evaluate_every": 13, "keep_best": "validation_reward"}
    found = run(sets, folder / "run", comm, train=more)
    rewards = steps_of(found, "reward")
    assert rewards[0] < 0.5
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.4
    assert found[-1]["validation_reward"] > 0.9
    assert (folder / "run/checkpoints/best").is_symlink()
    assert steps_of(found, "kl")[0] == pytest.approx(0, abs=1e-9)
    assert steps_of(found, "kl")[-1] > 0.01
    assert all(1 <= each <= 4 for each in steps_of(found, "answer_tokens"))
    # One update a step: the loss is the divergence alone, as advantages have the mean 0.
    for line in found[1:3]:
        assert line["loss"] == pytest.approx(0.04 * line["kl"], rel=1e-3, abs=1e-8)
    print_evaluation(folder / "run", None, False, True, comm, Console(speaks=False))


LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "zero 2": {"zero": 2},
    "zero 3": {"zero": 3},
}


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_texts_and_losses_are_the_same_in_each_layout(
    layout: str, alone: list[dict[str, Any]], sets: Sets, folder: Path, comm: MPI.Intracomm
) -> None:
    found = run(sets, folder / "run", comm, parallel=LAYOUTS[layout], **TWICE)
    for name in ("reward", "alike_groups", "answer_tokens", "cut_answers"):
        assert steps_of(found, name) == steps_of(alone, name)
    assert losses(found) == pytest.approx(losses(alone), rel=1e-5, abs=1e-8)
    for name in ("kl", "grad_norm"):
        expected = steps_of(alone, name)
        assert steps_of(found, name) == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert found[-1]["validation_reward"] == alone[-1]["validation_reward"]


@pytest.mark.ranks(3)
def test_a_fixed_order_keeps_the_bits(sets: Sets, folder: Path, comm: MPI.Intracomm) -> None:
    more = {"train": {"microbatch": 4, "fixed_order": True}}
    if comm.rank == 0:
        run(sets, folder / "one", MPI.COMM_SELF, **more)
    comm.Barrier()
    found = run(sets, folder / "three", comm, **more)
    for name in ("loss", "reward", "kl", "grad_norm"):
        assert steps_of(found, name) == steps_of(lines_of(folder / "one"), name)


@pytest.mark.ranks(1)  # rank 0 finds the checkpoint at any number of ranks
def test_a_resumed_run_continues_with_the_same_answers(
    alone: list[dict[str, Any]], sets: Sets, folder: Path, comm: MPI.Intracomm
) -> None:
    run(sets, folder / "run", comm, task=TWICE["task"], train={"steps": 2, "microbatch": 4})
    found = run(sets, folder / "run", comm, resume=True, **TWICE)
    assert losses(found) == losses(alone)
    other = {"steps": 4, "start_from": str(sets.folder / "alone"), "microbatch": 4}
    with pytest.raises(MismatchError, match=r"another model than the reference that .* task\.kl"):
        run(sets, folder / "run", comm, resume=True, train=other)


def test_a_reward_of_ones_own_without_a_reference(
    sets: Sets, folder: Path, comm: MPI.Intracomm
) -> None:
    """In a lower dtype, too: the cache has that of the weights."""
    rewards = {"rewards": ["number", f"{HERE}:ends_well"], "kl": 0.0}
    dtype = {"steps": 1, "dtype": "bfloat16"}
    [line, _] = run(sets, folder / "run", comm, task=rewards, train=dtype)
    assert line["reward_number"] == 0
    assert line["reward"] == line[f"reward_{HERE}:ends_well"] > 0
    assert "kl" not in line


def test_every_prompt_has_its_turn() -> None:
    import numpy as np

    found = prompt_numbers(np.arange(20), 10, 3).reshape(2, 10)
    assert sorted(found[0]) == sorted(found[1]) == list(range(10))
    assert found[0].tolist() != found[1].tolist()


@pytest.mark.ranks(1, 4)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train": {"start_from": ""}}, r"train\.start_from names no model that writes some"),
        ({"train": {"batch": 20}}, r"20 answers are no whole groups of task\.group = 6; .* as 18"),
        ({"train": {"compile": True}}, r"the rows of the task grpo are as long as the answers"),
        ({"data": {"document_mask": True}}, r"document_mask = true is of rows with several"),
        ({"task": {"answer_tokens": 90}}, r"leaves 7 tokens for a prompt .* lower task\.answer_to"),
        ({"task": {"rewards": ["exat"]}}, r"rewards names 'exat', and the rewards are exact, num"),
        ({"task": {"rewards": [f"{HERE}:nothing"]}}, r"nothing is nan for the answer .* is a fin"),
        ({"task": {"group": 1}}, r"task\.group = 1: .*greater than or equal to 2"),
        ({"train": {"keep_best": "validation_rewards"}}, r"which gives .*validation_reward"),
    ],
)
def test_wrong_input_is_refused(
    more: dict[str, Any], message: str, sets: Sets, folder: Path, comm: MPI.Intracomm
) -> None:
    if "keep_best" in more.get("train", {}):
        more = {"train": {**more["train"], "evaluate_every": 1}}
    with pytest.raises(MpillmError, match=message):
        run(sets, folder / "run", comm, **more)
    assert not (folder / "run/checkpoints/step-00000001").exists()


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("axis", ["pipeline", "tensor"])
def test_a_cut_model_is_refused(axis: str, sets: Sets, folder: Path, comm: MPI.Intracomm) -> None:
    with pytest.raises(MpillmError, match=rf"a whole model on each rank, which parallel\.{axis}"):
        run(sets, folder / "run", comm, parallel={axis: 2})
