"""`mpillm evaluate` of a classifier: intervals, two models, baselines, a temperature."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpillm.errors import MismatchError, UsageError
from mpillm.infer.loading import load_data, load_trained, open_of
from mpillm.infer.print_evaluation import ClassifierOptions, print_evaluation
from mpillm.infer.scores.bootstrap import SEED
from mpillm.infer.scores.calibrate import fit_temperature
from mpillm.models.linear_head import plain_outputs
from mpillm.system.console import Console
from mpillm.tasks.metrics.calibration import CalibrationError
from mpillm.tasks.metrics.metric import Totals
from mpillm.tasks.row_draws import row_draws
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.order import task_keys
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.samples import RowShape
from mpillm.train.recipe import parse_recipe
from mpillm.train.setup import train
from mpillm.verbs.evaluate import Evaluate

QUIET = Console(speaks=False)
GOOD, BAD = ("fine", "lovely", "bright", "warm"), ("poor", "dull", "cold", "grim")
FIGURES = ("loss", "accuracy", "macro-f1", "ece", "brier", "confusion-matrix")


def write_reviews(path: Path) -> None:
    """Write 300 short reviews; one in eight has words of the other class, so that none is sure."""
    chance, lines = np.random.default_rng(1), []
    for number in range(300):
        words = (GOOD, BAD)[(number + (chance.random() < 0.125)) % 2]
        text = " ".join(chance.choice(words, 3))
        lines.append(json.dumps({"text": text, "label": ("good", "bad")[number % 2]}))
    path.write_text("\n".join(lines))


@pytest.fixture(scope="module")
def runs(shared_folder: Path, comm: MPI.Intracomm) -> tuple[Path, Path]:
    """Train two classifiers of the same reviews, the first for a few steps. Tests read them."""
    folder = shared_folder / "reviews"
    if comm.rank == 0:
        folder.mkdir()
        write_reviews(folder / "reviews.jsonl")
    comm.Barrier()
    source = (str(folder / "reviews.jsonl"),)
    options = PrepareOptions(
        source, folder / "data", tokenizer="bytes", validation=0.3, task="sequence-classification"
    )
    prepare(options, comm, QUIET)
    for name, steps in (("begun", 3), ("trained", 60)):
        table: dict[str, Any] = {
            "model": {"shape": "cnn", "layers": 1, "width": 16, "context": 32},
            "task": {"name": "sequence-classification"},
            "optimizer": {"learning_rate": 0.02, "warmup_steps": 1},
            "data": {"path": str(folder / "data")},
            "train": {"run": str(folder / name), "steps": steps, "batch": 12},
        }
        if comm.rank == 0:
            train(parse_recipe(table, "reviews"), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    return folder / "begun", folder / "trained"


def printed(comm: MPI.Intracomm, trained: Path, as_json: bool, **options: Any) -> str:
    """Return what rank 0 prints."""
    stream = StringIO()
    console = Console(speaks=comm.rank == 0, stream=stream)
    print_evaluation(
        trained, None, options.pop("baselines", False), as_json, comm, console, **options
    )
    return comm.bcast(stream.getvalue())


def facts(comm: MPI.Intracomm, trained: Path, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(comm, trained, True, **options))
    return found


def test_two_models_are_compared_alike_at_any_number_of_ranks(
    runs: tuple[Path, Path], comm: MPI.Intracomm
) -> None:
    together = facts(comm, runs[0], other=runs[1], metrics=FIGURES)
    assert together == facts(MPI.COMM_SELF, runs[0], other=runs[1], metrics=FIGURES)
    model, other, difference = (together[name] for name in ("model", "other", "difference"))
    assert model["rows"] == other["rows"] == sum(map(sum, model["confusion_matrix"]))
    for name in ("loss", "accuracy", "macro_f1", "ece", "brier"):
        low, high = other["intervals"][name]
        assert low <= other[name] <= high or name == "ece"
        assert difference[name]["value"] == pytest.approx(other[name] - model[name])
    assert difference["accuracy"]["value"] > 0.1
    assert difference["accuracy"]["p"] < 0.01
    assert difference["accuracy"]["interval"][0] > 0
    same = facts(comm, runs[1], other=runs[1])
    assert {each["p"] for each in same["difference"].values()} == {1.0}


def test_the_tables_hold_n_intervals_and_the_confusions(
    runs: tuple[Path, Path], comm: MPI.Intracomm
) -> None:
    text = " ".join(printed(comm, runs[0], False, other=runs[1], metrics=FIGURES).split())
    rows = facts(comm, runs[0])["model"]["rows"]
    assert f"n = {rows} rows" in text
    for word in ("difference", "Brier score", "macro F1", "confusion matrix of other", "good"):
        assert word in text


def test_baselines_learn_the_training_texts(runs: tuple[Path, Path], comm: MPI.Intracomm) -> None:
    found = facts(comm, runs[1], baselines=True)
    for name in ("bag of words", "TF-IDF", "Word2Vec"):
        assert found[name]["rows"] == found["model"]["rows"]
        assert found[name]["accuracy"] > 0.75, name
        assert found[name]["intervals"]["accuracy"][0] > 0.6
    assert found["TF-IDF"] == facts(MPI.COMM_SELF, runs[1], baselines=True)["TF-IDF"]
    assert "Word2Vec" in printed(comm, runs[1], False, baselines=True)


def test_a_temperature_is_fitted_on_half_of_the_rows_and_tested_on_the_others(
    runs: tuple[Path, Path], comm: MPI.Intracomm
) -> None:
    found = facts(comm, runs[0], more=ClassifierOptions(calibrated=True))["calibration"]
    assert (
        found
        == facts(MPI.COMM_SELF, runs[0], more=ClassifierOptions(calibrated=True))["calibration"]
    )
    loaded = load_trained(runs[0], comm, QUIET)
    with open_of(load_data(loaded.checkpoint, None), "validation") as reader:
        assert isinstance(reader, PairReader)
        row = RowShape.of(loaded.task, Lengths.of(loaded.model.spec))
        fields = loaded.task.fields(reader.read(np.arange(reader.n_pairs), row))
    with torch.inference_mode():
        (head,) = plain_outputs(loaded.model.forward_part(fields, ()).outputs)
    logits, targets = head.double().numpy(), fields["targets"].numpy()
    fitted = row_draws(task_keys(SEED, np.arange(len(targets))), 1)[:, 0] < 0.5
    temperature = fit_temperature(logits[fitted], targets[fitted])
    assert found["temperature"] == pytest.approx(temperature, rel=1e-4)
    others = {"targets": targets[~fitted]}
    assert 0.3 * len(targets) < found["rows"] == len(others["targets"])
    for key, divisor in (("ece_before", 1.0), ("ece_after", temperature)):
        rows = CalibrationError().of_rows([logits[~fitted] / divisor], others)
        value = CalibrationError().value(rows.sum(0), Totals(0.0, 1.0, 0))
        assert found[key] == pytest.approx(value, abs=1e-4)
    assert "the ECE is" in printed(comm, runs[0], False, more=ClassifierOptions(calibrated=True))


def test_what_cannot_be_compared_or_scored_is_refused(
    runs: tuple[Path, Path], folder: Path, documents: Path, comm: MPI.Intracomm
) -> None:
    with pytest.raises(UsageError, match="the metric entity-f1 reads a class of each position"):
        print_evaluation(runs[0], None, False, False, comm, QUIET, ["entity-f1"])
    text = folder / "text"
    options = PrepareOptions((str(documents),), text, tokenizer="bytes", validation=0.3)
    prepare(options, comm, QUIET)
    table: dict[str, Any] = {
        "model": {"layers": 1, "width": 16, "heads": 2, "context": 16},
        "data": {"path": str(text)},
        "train": {"run": str(folder / "16"), "steps": 1, "batch": 12},
    }
    train(parse_recipe(table, "16"), comm, QUIET)
    table["model"]["context"], table["train"]["run"] = 32, str(folder / "32")
    train(parse_recipe(table, "32"), comm, QUIET)
    short, long = folder / "16", folder / "32"
    with pytest.raises(MismatchError, match="windows of 17 and 33 tokens"):
        print_evaluation(short, None, False, False, comm, QUIET, other=long)
    with pytest.raises(MismatchError, match="the models have other data"):
        print_evaluation(short, None, False, False, comm, QUIET, other=runs[0])
    with pytest.raises(UsageError, match="--calibrate fits the probabilities of classes"):
        print_evaluation(
            short, None, False, False, comm, QUIET, more=ClassifierOptions(calibrated=True)
        )
    plotted = ClassifierOptions(plot=folder / "plot.png")
    with pytest.raises(
        UsageError, match=r"--plot draws .* of classes, and the task causal-lm gives"
    ):
        print_evaluation(short, None, False, False, comm, QUIET, more=plotted)
    assert not (folder / "plot.png").exists()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_classes_are_drawn(
    runs: tuple[Path, Path], folder: Path, comm: MPI.Intracomm, suffix: str
) -> None:
    pictures = [folder / f"{name}{suffix}" for name in ("first", "again")]
    for picture in pictures:
        more = ClassifierOptions(plot=picture)
        given = {"other": runs[1], "metrics": ["accuracy"], "more": more}
        found = json.loads(printed(comm, runs[0], True, **given))
    # What the plots show is in the figures, too.
    assert {"accuracy", "reliability", "confusion_matrix"} <= found["other"].keys()
    if comm.rank == 0:
        first, again = (picture.read_bytes() for picture in pictures)
        assert len(first) > 5000
        # SVG draws ids of its own for the clips.
        assert suffix == ".svg" or first == again
    if comm.rank == 0 and suffix == ".svg":
        assert b"<svg" in first


def test_a_plot_without_classes_or_a_place_is_refused(
    runs: tuple[Path, Path], folder: Path, comm: MPI.Intracomm
) -> None:
    with pytest.raises(UsageError, match=r"--plot .* is a folder"):
        printed(comm, runs[0], False, more=ClassifierOptions(plot=folder))
    with pytest.raises(UsageError, match=r"end the name plot\.txt in \.png"):
        Evaluate(runs[0], plot=Path("plot.txt"))
    with pytest.raises(UsageError, match="--plot is of losses, and --generate of texts"):
        Evaluate(runs[0], plot=Path("plot.png"), generate=True)
