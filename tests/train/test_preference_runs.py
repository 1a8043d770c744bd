"""Preference tuning, from records to an evaluation: DPO after instruction tuning, on any ranks."""

import json
import random
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.errors import CheckpointError, MismatchError, RecipeError
from mpillm.infer.print_evaluation import print_evaluation
from mpillm.system.console import Console
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.train.recipe import parse_recipe
from mpillm.train.setup import train
from tests.tokens.chat.templates import FOLDER, say, tokenizer

QUIET = Console(speaks=False)
CONTEXT = 96
MODEL = {"layers": 2, "width": 16, "heads": 2, "hidden": 32, "context": CONTEXT}
WORDS = ("hello", "there", "how", "are", "you", "well", "model")


def records(count: int) -> list[dict[str, Any]]:
    """Pairs of an answer that ends and one that goes on, to prompts of words in any order."""
    draw = random.Random(5)
    made = []
    for _ in range(count):
        words = draw.sample(WORDS, 3)
        prompt, answer = " ".join(words), " ".join(words[:2])
        made.append({"prompt": prompt, "chosen": f"{answer}.", "rejected": f"{answer} 1, 2, 3, 3"})
    return made


@dataclass(frozen=True)
class Sets:
    """A folder with the datasets of conversations and of pairs, and the run that DPO begins with."""

    folder: Path

    @property
    def start(self) -> Path:
        return self.folder / "chat-run"

    def data(self, name: str) -> Path:
        return self.folder / name / "out"


def write(folder: Path, lines: list[dict[str, Any]], **more: Any) -> None:
    """Prepare records with the tokenizer of the templates, in ChatML."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer().to_json())
    (folder / "records.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    given = {
        "task": "preference",
        "tokenizer": str(folder / "tokenizer.json"),
        "chat_template": FOLDER / "chatml.jinja",
        "validation": 0.25,
        **more,
    }
    options = PrepareOptions((str(folder / "records.jsonl"),), folder / "out", **given)
    prepare(options, MPI.COMM_SELF, QUIET)


def run(
    sets: Sets, folder: Path, comm: MPI.Intracomm, resume: bool = False, **more: Any
) -> list[dict[str, Any]]:
    """Train, and return the lines of metrics.jsonl."""
    table: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "task": {"name": "dpo", "beta": 0.5},
        "optimizer": {"learning_rate": 0.005, "warmup_steps": 1},
        "data": {"path": str(sets.data("pairs"))},
        "train": {
            "run": str(folder),
            "steps": 3,
            "batch": 12,
            "sinks": [],
            "start_from": str(sets.start),
        },
    }
    table = {name: {**keys, **more.get(name, {})} for name, keys in table.items()}
    table["parallel"] = more.get("parallel", {})
    train(parse_recipe(table, "r"), comm, QUIET, resume=resume)
    return list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="session")
def sets(shared_folder: Path, comm: MPI.Intracomm) -> Sets:
    made = Sets(shared_folder / "preferences")
    if comm.rank == 0:
        pairs = records(160)
        write(made.folder / "pairs", pairs)
        # Half of the answers end as they should.
        chats = [
            {"messages": say(each["prompt"], each["rejected" if number % 2 else "chosen"])}
            for number, each in enumerate(pairs)
        ]
        write(made.folder / "chats", chats, task="chat")
        table = {
            "task": {"name": "chat", "beta": 0.1},
            "data": {"path": str(made.data("chats"))},
            "train": {"steps": 20, "start_from": ""},
        }
        run(made, made.start, MPI.COMM_SELF, **table)
    comm.Barrier()
    return made


@pytest.fixture(scope="session")
def alone(sets: Sets, comm: MPI.Intracomm) -> list[dict[str, Any]]:
    """The metrics of DPO on one rank."""
    if comm.rank == 0:
        run(sets, sets.folder / "alone", MPI.COMM_SELF, train={"steps": 12})
    comm.Barrier()
    text = (sets.folder / "alone/metrics.jsonl").read_text()
    return list(map(json.loads, text.splitlines()))


def test_dpo_learns_what_is_preferred(
    alone: list[dict[str, Any]], sets: Sets, comm: MPI.Intracomm
) -> None:
    """The model at the start is its own reference: all margins are 0 then."""
    assert losses(alone)[0] == pytest.approx(np.log(2), abs=1e-5)
    last = alone[-1]
    print(alone)
    assert last["validation_preference_accuracy"] > 0.8
    assert last["validation_reward_margin"] > 0.1
    assert last["validation_loss"] < 0.65
