"""Preference tuning, from records to an evaluation: DPO and KTO after instruction tuning."""

import json
import random
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.errors import CheckpointError, MismatchError, MpillmError
from mpillm.infer.print_evaluation import print_evaluation
from mpillm.infer.print_generation import print_generation
from mpillm.infer.sampling import Sampling
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
    """Datasets of conversations, pairs and answers, and the run that the others begin with."""

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
        labelled = [
            {"prompt": each["prompt"], "completion": each[side], "label": side == "chosen"}
            for number, each in enumerate(pairs)
            for side in [("chosen", "rejected")[number % 2]]
        ]
        write(made.folder / "labelled", labelled)
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


def test_dpo_learns_what_is_preferred(alone: list[dict[str, Any]]) -> None:
    """The model at the start is its own reference: all margins are 0 then."""
    assert losses(alone)[0] == pytest.approx(np.log(2), abs=1e-5)
    last = alone[-1]
    assert last["validation_preference_accuracy"] > 0.8
    assert last["validation_reward_margin"] > 0.1
    assert last["validation_loss"] < 0.65


def test_what_was_preferred_answers_a_users_turn(
    alone: list[dict[str, Any]], sets: Sets, comm: MPI.Intracomm
) -> None:
    said = []
    for chat in (None, True):
        stream = StringIO()
        console = Console(speaks=comm.rank == 0, stream=stream)
        sampling = Sampling(max_tokens=4)
        print_generation(sets.folder / "alone", "ab", sampling, comm, console, "cpu", chat)
        said.append(stream.getvalue())
    assert said[0] == said[1]
    assert not said[0].startswith("ab")


# Two ranks share the layers and the heads.
EVEN = pytest.mark.ranks(2, 4)
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "zero": {"zero": 3},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2, "schedule": "zb-h1"},
}


@pytest.mark.parametrize(
    "layout",
    ["data", "zero", pytest.param("tensor", marks=EVEN), pytest.param("pipeline", marks=EVEN)],
)
def test_the_losses_are_the_same_in_each_layout(
    layout: str, alone: list[dict[str, Any]], sets: Sets, folder: Path, comm: MPI.Intracomm
) -> None:
    if comm.size == 1:
        pytest.skip("one rank has nothing to share")
    found = run(sets, folder / "run", comm, parallel=LAYOUTS[layout], train={"microbatch": 1})
    assert losses(found) == pytest.approx(losses(alone)[:3], rel=1e-5)


def evaluated(place: Path, comm: MPI.Intracomm, data: Path | None = None) -> dict[str, Any]:
    stream = StringIO()
    console = Console(speaks=comm.rank == 0, stream=stream)
    print_evaluation(place, data, False, True, comm, console)
    return dict(json.loads(comm.bcast(stream.getvalue())))


def test_an_evaluation_gives_accuracy_and_margin_with_intervals(
    alone: list[dict[str, Any]], sets: Sets, comm: MPI.Intracomm
) -> None:
    found = evaluated(sets.folder / "alone", comm)["model"]
    assert found["rows"] == found["tokens"]
    for name in ("loss", "preference_accuracy", "reward_margin"):
        assert found[name] == pytest.approx(alone[-1][f"validation_{name}"], rel=1e-5)
        low, high = found["intervals"][name]
        assert low - 1e-9 <= found[name] <= high + 1e-9


@pytest.mark.ranks(1)  # rank 0 reads the file at any number of ranks
def test_a_resumed_run_keeps_its_reference(
    alone: list[dict[str, Any]], sets: Sets, folder: Path, comm: MPI.Intracomm
) -> None:
    run(sets, folder / "run", comm, train={"steps": 2})
    (folder / "gone").mkdir()
    moved = {"train": {"steps": 3, "start_from": str(folder / "gone")}}
    whole = run(sets, folder / "whole", comm, train={"steps": 3})
    again = run(sets, folder / "run", comm, resume=True, **moved)
    assert losses(again)[2] == losses(whole)[2]
    (folder / "run/reference-train.npy").unlink()
    with pytest.raises(CheckpointError, match=r"reference-train\.npy holds .* copy it back, or"):
        run(sets, folder / "run", comm, resume=True, train={"steps": 4})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train": {"start_from": ""}}, r"train\.start_from names none; name the run of an"),
        ({"task": {"beta": 0.0}}, r"task\.beta = 0\.0: .*greater than 0"),
        ({"data": {"path": "chats"}}, r"holds pairs of the task chat, and the task dpo learns"),
        ({"data": {"path": "labelled"}}, r"holds pairs of the task kto, and the task dpo learns"),
        ({"task": {"name": "kto"}}, r"holds pairs of the task preference, and the task kto"),
        ({"train": {"compile": True}}, r"the task dpo keeps answers apart, which cuts each batch"),
        ({"model": {"context": 20}}, r"is whole within 21 tokens, both answers together"),
    ],
)
def test_wrong_input_is_refused(
    more: dict[str, Any], message: str, sets: Sets, folder: Path, comm: MPI.Intracomm
) -> None:
    if "path" in more.get("data", {}):
        more = {"data": {"path": str(sets.data(more["data"]["path"]))}}
    with pytest.raises(MpillmError, match=message):
        run(sets, folder / "run", comm, **more)
    assert not (folder / "run/metrics.jsonl").exists()


def test_other_data_has_no_reference(
    alone: list[dict[str, Any]], sets: Sets, folder: Path, comm: MPI.Intracomm
) -> None:
    if comm.rank == 0:
        write(folder / "other", records(40))
    comm.Barrier()
    with pytest.raises(MismatchError, match=r"known for the run's own data alone, and .* leave"):
        evaluated(sets.folder / "alone", comm, folder / "other/out")


def kto(
    sets: Sets, folder: Path, comm: MPI.Intracomm, steps: int, **parallel: Any
) -> list[dict[str, Any]]:
    return run(
        sets,
        folder,
        comm,
        task={"name": "kto"},
        data={"path": str(sets.data("labelled"))},
        train={"steps": steps},
        parallel=parallel,
    )


@pytest.fixture(scope="session")
def kto_alone(sets: Sets, comm: MPI.Intracomm) -> list[dict[str, Any]]:
    """The metrics of KTO on one rank."""
    if comm.rank == 0:
        kto(sets, sets.folder / "kto", MPI.COMM_SELF, 12)
    comm.Barrier()
    return list(map(json.loads, (sets.folder / "kto/metrics.jsonl").read_text().splitlines()))


def test_kto_learns_what_is_desirable(kto_alone: list[dict[str, Any]]) -> None:
    assert losses(kto_alone)[0] == pytest.approx(0.5, abs=1e-5)
    assert kto_alone[-1]["validation_preference_accuracy"] > 0.8
    assert kto_alone[-1]["validation_reward_margin"] > 0.1


@pytest.mark.parametrize(
    "layout",
    ["data", "zero", pytest.param("tensor", marks=EVEN), pytest.param("pipeline", marks=EVEN)],
)
def test_kto_has_the_same_losses_in_each_layout(
    layout: str, kto_alone: list[dict[str, Any]], sets: Sets, folder: Path, comm: MPI.Intracomm
) -> None:
    if comm.size == 1:
        pytest.skip("one rank has nothing to share")
    found = kto(sets, folder / "run", comm, 3, **LAYOUTS[layout])
    assert losses(found) == pytest.approx(losses(kto_alone)[:3], rel=1e-5)
