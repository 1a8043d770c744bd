"""Answers to validation pairs: the same at any number of ranks, scored, shown and written."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI
from sacrebleu.metrics import BLEU

from mpillm.errors import DataError, MpillmError, UsageError
from mpillm.infer.chat_prompt import chat_prompt
from mpillm.infer.decoding.print_answers import AnswerOptions, print_answers
from mpillm.infer.loading import load_trained
from mpillm.infer.print_generation import print_generation
from mpillm.infer.sampling import Decoding, Sampling
from mpillm.system.console import Console
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.train.recipe import parse_recipe
from mpillm.train.setup import train
from mpillm.verbs.evaluate import Evaluate
from tests.tokens.chat.templates import template
from tests.tokens.pairs.test_chat_rows import conversations, made

QUIET = Console(speaks=False)
TESTS = Path(__file__).parents[2]
# A language model of mpillm 0.1.
PLAIN, PLAIN_DATA = TESTS / "weights/data_0_1/step-00000004", TESTS / "tokens/data_0_1"
PAIRS, CONTEXT = 60, 20
GREEDY = Sampling(temperature=0)
SMALL = {"layers": 1, "width": 16, "heads": 2, "hidden": 32}
KINDS = ("seq2seq", "chat")
MODELS: dict[str, dict[str, Any]] = {
    "seq2seq": {"architecture": "encoder-decoder", "shape": "t5-tiny", "source_context": 16},
    "chat": {"kv_heads": 1},
}


@pytest.fixture(scope="session")
def runs(shared_folder: Path, comm: MPI.Intracomm) -> Path:
    """Prepare pairs and conversations, and train a few steps on each."""
    folder = shared_folder / "answers"
    if comm.rank == 0:
        folder.mkdir()
        words = [f"{number:b}" for number in range(PAIRS)]
        lines = [json.dumps({"source": word, "target": word[::-1] + " ok"}) for word in words]
        (folder / "pairs.jsonl").write_text("\n".join(lines))
        made(folder / "chat", conversations(PAIRS), validation=0.3)
    comm.Barrier()
    options = PrepareOptions(
        (str(folder / "pairs.jsonl"),),
        folder / "seq2seq/out",
        tokenizer="bytes",
        task="seq2seq",
        validation=0.3,
    )
    prepare(options, comm, QUIET)
    for kind in KINDS:
        context = CONTEXT if kind == "seq2seq" else 3 * CONTEXT
        table = {
            "task": {"name": kind},
            "model": {**SMALL, **MODELS[kind], "context": context},
            "data": {"path": str(folder / kind / "out")},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
            "train": {"run": str(folder / kind / "run"), "sinks": [], "steps": 6, "batch": 12},
        }
        train(parse_recipe(table, "test"), comm, QUIET)
    return folder


def answers(
    path: Path, comm: MPI.Intracomm, decoding: Decoding, **more: Any
) -> tuple[str, Console]:
    stream = StringIO()
    console = Console(speaks=comm.rank == 0, stream=stream, watched=False)
    trained = [path / "run", path / "run"] if more.pop("twice", False) else [path / "run"]
    print_answers(trained, None, AnswerOptions(decoding, **more), comm, console, "cpu")
    return comm.bcast(stream.getvalue()), console


@pytest.mark.parametrize(
    ("kind", "decoding"),
    [
        ("seq2seq", Decoding(GREEDY)),
        ("seq2seq", Decoding(GREEDY, 9, 3, 0.8)),
        ("chat", Decoding(Sampling(temperature=1.0, seed=4), 12)),
        ("chat", Decoding(GREEDY, 12, 2)),
    ],
    ids=["greedy", "beams", "sampled", "chat beams"],
)
def test_each_question_once_and_the_same_at_any_number_of_ranks(
    kind: str, decoding: Decoding, runs: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    found = answers(runs / kind, comm, decoding, outputs=folder / "together.jsonl", as_json=True)[0]
    own = folder / f"alone-{comm.rank}.jsonl"
    alone = answers(runs / kind, MPI.COMM_SELF, decoding, outputs=own, as_json=True)[0]
    assert found == alone
    text = (folder / "together.jsonl").read_text()
    assert text == own.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    score = json.loads(found)
    assert [row["number"] for row in rows] == list(range(len(rows)))
    assert len(rows) == score["model"]["rows"] > 10
    assert len({row["source"] for row in rows}) == len(rows)
    assert score["examples"] == rows[:3]
    assert score["decoding"]["beams"] == decoding.beams
    if kind == "seq2seq":
        assert all(row["reference"] == row["source"][::-1] + " ok" for row in rows)
        wanted = BLEU().corpus_score(
            [row["output"] for row in rows], [[row["reference"] for row in rows]]
        )
        assert score["model"]["bleu"] == pytest.approx(wanted.score)
        assert set(score["model"]["intervals"]) == {"bleu", "chrf"}
    else:
        # The question is the whole conversation up to the answer.
        known = [chat[-1]["content"] for chat in conversations(PAIRS)]
        assert all(row["reference"] in known for row in rows)
        assert all("user" in row["source"] for row in rows)


def test_tables_have_intervals_signatures_and_examples(runs: Path, comm: MPI.Intracomm) -> None:
    options = {"metrics": ("bleu", "exact-match"), "twice": True}
    text = answers(runs / "seq2seq", comm, Decoding(GREEDY, 5), **options)[0]
    assert "greedy" in text
    assert "difference" in text
    assert "BLEU|nrefs:1" in text
    assert "example 0" in text
    assert "other_output" in text


def refused(path: Path, comm: MPI.Intracomm, decoding: Decoding, **more: Any) -> str:
    with pytest.raises(MpillmError) as failure:
        answers(path, comm, decoding, **more)
    return str(failure.value)


def test_what_cannot_be_answered_is_refused(runs: Path, folder: Path, comm: MPI.Intracomm) -> None:
    path, greedy = runs / "seq2seq", Decoding(GREEDY)
    (folder / "mine").write_text("kept")
    text = refused(path, comm, greedy, outputs=folder / "mine")
    assert "mine is there already; name another --outputs" in text
    assert (folder / "mine").read_text() == "kept"
    text = refused(path, comm, greedy, metrics=("accuracy",))
    assert "the metric accuracy compares no texts; take one of" in text
    assert "bleu" in text
    text = refused(path, comm, Decoding(GREEDY, CONTEXT + 1))
    assert f"--max-tokens {CONTEXT + 1} is beyond the model's context of {CONTEXT} tokens" in text


def test_a_task_without_references_is_refused(comm: MPI.Intracomm) -> None:
    with pytest.raises(UsageError, match="data of the task causal-lm has none; it is for seq2seq"):
        print_answers([PLAIN], PLAIN_DATA, AnswerOptions(Decoding(GREEDY)), comm, QUIET, "cpu")


def test_data_without_validation_pairs_is_refused(
    runs: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    source = (str(runs / "pairs.jsonl"),)
    given = {"tokenizer": "bytes", "task": "seq2seq", "validation": 0.0}
    prepare(PrepareOptions(source, folder / "all", **given), comm, QUIET)
    options = AnswerOptions(Decoding(GREEDY))
    with pytest.raises(DataError, match="validation"):
        print_answers([runs / "seq2seq/run"], folder / "all", options, comm, QUIET, "cpu")


def test_long_questions_keep_their_ends(runs: Path, comm: MPI.Intracomm) -> None:
    text = answers(runs / "chat", comm, Decoding(GREEDY, 3 * CONTEXT - 9))[0]
    assert "questions only the last 10 tokens are read" in text


def test_a_user_turn_is_answered(runs: Path, comm: MPI.Intracomm) -> None:
    run, sampling = runs / "chat/run", Sampling(max_tokens=8, seed=1)
    loaded = load_trained(run, comm, QUIET)
    prompt = chat_prompt(loaded, "hello")
    written = template("chatml").render([{"role": "user", "content": "hello"}], prompt=True)
    assert written.endswith("hello<|im_end|>\n<|im_start|>assistant\n")
    assert loaded.tokenizer.encode_rendered([written])[0][0].tolist() == prompt.ids
    assert prompt.ends == {loaded.tokenizer.vocabulary.special["<|im_end|>"]}
    said = []
    for chat in (None, True, False):
        stream = StringIO()
        console = Console(speaks=comm.rank == 0, stream=stream)
        print_generation(run, "hello", sampling, comm, console, "cpu", chat)
        said.append(comm.bcast(stream.getvalue()))
    assert said[0] == said[1]
    assert not said[0].startswith("hello")
    assert said[2].startswith("hello")
    with pytest.raises(UsageError, match="--chat is for decoders"):
        print_generation(runs / "seq2seq/run", "a", sampling, comm, QUIET, "cpu", True)


def test_a_model_without_a_template_is_no_chat(comm: MPI.Intracomm) -> None:
    with pytest.raises(UsageError, match=r"by the chat template of a model, and .* has none"):
        print_generation(PLAIN, "a", Sampling(), comm, QUIET, "cpu", True)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"beams": 0}, "--beams is a number from 1 to 1,024, and not 0"),
        ({"beams": 4, "temperature": 0.5}, "--beams 4 finds the likeliest text, and --temp"),
        ({"length_penalty": 2.0}, "--length-penalty compares beams"),
        ({"beams": 2, "length_penalty": float("nan")}, "--length-penalty is a number from -10"),
        ({"max_tokens": 0}, "--max-tokens is a number from 1"),
        ({"baselines": True}, "--baselines is of losses, and --generate of texts"),
        ({"generate": False, "beams": 4}, "--beams is for texts that the model writes"),
        ({"generate": False, "outputs": Path("x")}, "--outputs is for texts"),
    ],
)
def test_options_that_do_not_fit_are_refused(given: dict[str, Any], rule: str) -> None:
    with pytest.raises(UsageError) as failure:
        Evaluate(Path("run"), **{"generate": True, **given})
    assert rule in str(failure.value)
