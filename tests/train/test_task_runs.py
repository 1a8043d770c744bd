"""Each task trains each kind of model: the same losses in each layout, and after a resume.

benchmarks/families.py compares 50 losses of each.
"""

import json
import wave
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.errors import MismatchError, RecipeError, UsageError
from mpillm.infer.evaluate import WholeModel, evaluate
from mpillm.infer.loading import load_data, load_trained, open_of
from mpillm.infer.print_evaluation import print_evaluation
from mpillm.infer.print_generation import print_generation
from mpillm.infer.sampling import Sampling
from mpillm.system.console import Console
from mpillm.tokens.pairs.pair_shards import PAIR_KINDS
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train

QUIET = Console(speaks=False)
STEPS = 4
SIZES = {"layers": 2, "width": 32, "heads": 4, "hidden": 48, "context": 32}
ENCODER = {"architecture": "encoder", **SIZES}
MODERN = {**SIZES, "shape": "modernbert-tiny", "layers": 4, "window": 8}
TRANSLATOR = {"architecture": "encoder-decoder", **SIZES, "layers": 1, "source_context": 48}
WHISPER = {**TRANSLATOR, "mels": 80, "positions": "sinusoidal", "decoder_positions": "learned"}
SOUND = {**ENCODER, "mels": 80, "positions": "sinusoidal", "context": 40, "head": "ctc"}
CLASSIC = {"layers": 2, "width": 32, "context": 32}
# A task, and where another than the usual model learns it, which.
CASES: dict[str, dict[str, Any]] = {
    "causal-lm of a mixture": {**SIZES, "experts": 4, "shared_hidden": 16, "balance_loss": 0.1},
    "chat": SIZES,
    "masked-lm": ENCODER,
    "masked-lm of ModernBERT": MODERN,
    "span-corruption": {**TRANSLATOR, "shape": "t5-tiny"},
    "seq2seq": {**TRANSLATOR, "norm_place": "post", "positions": "sinusoidal"},
    "speech-to-text": WHISPER,
    "sequence-classification": {**MODERN, "head": "sequence", "pooling": "mean"},
    "sequence-classification of an LSTM": {"shape": "lstm", **CLASSIC},
    "sequence-classification of convolutions": {"shape": "cnn", **CLASSIC},
    "multi-label-classification": {**ENCODER, "head": "sequence"},
    "question-answering": {**ENCODER, "head": "span", "head_layer": "none"},
    "regression of convolutions": {"shape": "cnn", **CLASSIC},
    "token-classification": {**ENCODER, "head": "token", "head_layer": "none"},
    "image-classification": {**SIZES, "shape": "vit-tiny-digits", "image_size": 4},
    "image-classification of a perceptron": {"shape": "mlp", **CLASSIC, "image_size": 4},
    "ctc": SOUND,
}
TASKS = {"speech-to-text": "seq2seq"}


def write_records(folder: Path) -> Path:
    """Write 60 records that have the fields of all kinds of pairs, and their sounds."""
    chance = np.random.default_rng(4)
    folder.mkdir()
    records = []
    for number in range(60):
        words = ["".join(chance.choice(list("abc"), 3)) for _ in range(chance.integers(1, 7))]
        label = int(chance.integers(0, 3))
        sound = chance.normal(size=chance.integers(2000, 7000)).cumsum() * (1 + label)
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(np.clip(sound * 99, -32768, 32767).astype("<i2").tobytes())
        text = " ".join(words)
        records.append(
            {
                "source": text,
                "target": text[::-1],
                "text": "xyz"[label] * 5 + text[:3],
                "label": f"class {label}",
                "labels": ["even", "large"][: label % 3],
                "stars": label / 2 - 0.5,
                "tokens": words,
                "tags": [int("a" in word) for word in words],
                "image": (chance.random((4, 4)) + label).tolist(),
                "audio": f"{number}.wav",
                "question": text[-3:],
                "context": text,
                "answers": {"text": [words[0]], "answer_start": [0]},
            }
        )
    path = folder / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    # Records with a question are conversations of another format.
    texts = ({"text": record["text"]} for record in records)
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return path


@pytest.fixture(scope="module")
def datasets(shared_folder: Path, documents: Path, comm: MPI.Intracomm) -> dict[str, Path]:
    """A small dataset for each task, but those of preferences."""
    tokens, pairs = shared_folder / "task-tokens", shared_folder / "task-pairs"
    bytes_of = partial(PrepareOptions, tokenizer="bytes", validation=0.1)
    prepare(bytes_of((str(documents),), tokens), comm, QUIET)
    if comm.rank == 0:
        write_records(pairs)
    comm.Barrier()
    made = dict.fromkeys(("causal-lm", "masked-lm", "span-corruption"), tokens)
    for task in (name for name, kind in PAIR_KINDS.items() if not kind.is_preference):
        made[task] = shared_folder / f"task-{task}"
        column = "stars" if task == "regression" else ""
        source = (str(pairs / ("texts.jsonl" if task == "chat" else "records.jsonl")),)
        options = bytes_of(
            source, made[task], task=task, target_field=column, row_tokens=32, stride=8
        )
        prepare(options, comm, QUIET)
    return made


def recipe(
    task: str,
    data: Path,
    run: Path,
    steps: int = STEPS,
    model: dict[str, Any] | None = None,
    fixed_order: bool = False,
    **parallel: object,
) -> Recipe:
    table: dict[str, Any] = {
        "model": model or CASES[task],
        "task": {"name": TASKS.get(task.partition(" of ")[0], task.partition(" of ")[0])},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 1, "decay_share": 0.0},
        "data": {"path": str(data)},
        "train": {
            "run": str(run),
            "sinks": [],
            "steps": steps,
            "batch": 12,
            "microbatch": 3,
            "fixed_order": fixed_order,
        },
        "parallel": parallel,
    }
    table["optimizer"]["schedule"] = "constant-then-decay"
    table["train"]["fixed_order"] = fixed_order
    return parse_recipe(table, task)


def recorded(run: Path) -> dict[str, list[float]]:
    lines = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    keys = {key for line in lines for key in line if key == "loss" or "validation" in key}
    return {key: [line[key] for line in lines if key in line] for key in sorted(keys)}


@pytest.mark.parametrize("task", CASES)
def test_a_task_is_learnt_and_scored_alike_in_each_layout_and_after_a_resume(
    task: str, datasets: dict[str, Path], folder: Path, comm: MPI.Intracomm
) -> None:
    data, alone = datasets[task.partition(" of ")[0]], folder / "alone"
    if comm.rank == 0:
        train(recipe(task, data, alone), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    expected = recorded(alone)
    assert len(expected["loss"]) == STEPS
    assert min(expected["loss"][1:]) < expected["loss"][0]
    run = folder / "together"
    parallel: dict[str, object] = {"pipeline": 1 + (comm.size % 2 == 0)}
    if comm.size == 2 and CASES[task]["layers"] == 4:
        parallel["schedule"] = "zb-v"
    train(recipe(task, data, run, steps=2, **parallel), comm, QUIET)
    train(recipe(task, data, run, **parallel), comm, QUIET, resume=True)
    found = recorded(run)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for key, values in expected.items():
        assert found[key][-1] == pytest.approx(values[-1], rel=1e-5), key
    loaded = load_trained(run, comm, QUIET)
    with open_of(load_data(loaded.checkpoint, None), "validation") as reader:
        scores = [
            evaluate(WholeModel(loaded.model, loaded.task, each), reader, each, QUIET)
            for each in (comm, MPI.COMM_SELF)
        ]
    assert scores[0] == scores[1]
    assert scores[0].loss == pytest.approx(expected["validation_loss"][-1], rel=1e-5)


@pytest.mark.parametrize("task", ["span-corruption", "speech-to-text"])
def test_two_stacks_have_the_same_bits_in_a_fixed_order(
    task: str, datasets: dict[str, Path], folder: Path, comm: MPI.Intracomm
) -> None:
    """Their cuts pass two streams, and three uses of one embedding may be on three ranks."""
    model = {**CASES[task], "layers": 4}
    fixed = partial(recipe, task, datasets[task], model=model, fixed_order=True)
    if comm.rank == 0:
        train(fixed(folder / "alone"), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    train(fixed(folder / "together", pipeline=comm.size), comm, QUIET)
    comm.Barrier()
    assert recorded(folder / "together") == recorded(folder / "alone")


@pytest.mark.parametrize(
    ("task", "data", "model", "words"),
    [
        ("masked-lm", "seq2seq", ENCODER, "pairs of the task seq2seq, and .* text"),
        ("seq2seq", "masked-lm", TRANSLATOR, "--task seq2seq or speech-to-text"),
        ("ctc", "speech-to-text", ENCODER, "learns from pairs: --task ctc"),
        ("sequence-classification", "", TRANSLATOR, "gives next tokens of a target"),
        (
            "sequence-classification",
            "",
            {**ENCODER, "head": "sequence", "classes": 2},
            "model.classes = 2 is smaller than the 3 of the data",
        ),
        (
            "masked-lm",
            "",
            {**ENCODER, "vocab_size": 257},
            "model.vocab_size = 257 is smaller than the 258",
        ),
    ],
)
def test_data_and_models_that_do_not_fit_a_task_are_refused(
    task: str,
    data: str,
    model: dict[str, Any],
    words: str,
    datasets: dict[str, Path],
    folder: Path,
    comm: MPI.Intracomm,
) -> None:
    with pytest.raises(MismatchError, match=words):
        train(recipe(task, datasets[data or task], folder / "run", model=model), comm, QUIET)
    assert not (folder / "run").exists()


def test_one_class_alone_is_refused(folder: Path, comm: MPI.Intracomm) -> None:
    path = folder / "one.jsonl"
    if comm.rank == 0:
        path.write_text('{"text": "a", "label": "yes"}\n{"text": "b", "label": "yes"}\n')
    comm.Barrier()
    task = "sequence-classification"
    given = PrepareOptions((str(path),), folder / "one", tokenizer="bytes", task=task)
    prepare(given, comm, QUIET)
    with pytest.raises(RecipeError, match="are 'yes', and one class alone cannot be learnt"):
        train(recipe(task, folder / "one", folder / "run"), comm, QUIET)
    assert not (folder / "run").exists()


def test_a_model_of_pictures_is_scored_without_baselines_and_writes_no_text(
    datasets: dict[str, Path], folder: Path, comm: MPI.Intracomm
) -> None:
    run = folder / "run"
    train(recipe("image-classification", datasets["image-classification"], run, 1), comm, QUIET)
    with pytest.raises(UsageError, match="no baselines of the task image-classification"):
        print_evaluation(run, None, True, False, comm, QUIET)
    print_evaluation(run, None, False, False, comm, QUIET)
    stream = StringIO()
    with pytest.raises(UsageError, match="does not continue text"):
        print_generation(run, "a prompt", Sampling(), comm, Console(stream=stream))
    assert not stream.getvalue()
