"""Classical classifiers, compared with scikit-learn's own pipeline on the texts themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss
from sklearn.pipeline import make_pipeline

from mpillm.errors import DataError
from mpillm.infer.loading import open_of
from mpillm.infer.scores.score import Score
from mpillm.infer.scores.text_baselines import read_texts, score_text_baselines
from mpillm.models.model_catalog import read_spec
from mpillm.system.console import Console
from mpillm.tasks.metrics.metric_catalog import make_metrics
from mpillm.tasks.task_catalog import make_task
from mpillm.tasks.vocabulary import Lengths, Vocabulary
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.samples import RowShape
from mpillm.tokens.tokenizer import byte_tokenizer

CLASSES = ("animal", "food", "tool")
WORDS = {"animal": "cat dog cow", "food": "bread soup pie", "tool": "saw axe nail"}


def prepared(folder: Path, classes: tuple[str, ...], comm: MPI.Intracomm) -> Manifest:
    """Prepare texts with a word of their class, and some of any."""
    if comm.rank == 0:
        chance, lines = np.random.default_rng(0), []
        every = " ".join(WORDS.values()).split()
        for number in range(120):
            label = classes[number % len(classes)]
            words = [*chance.choice(every, 3), *chance.choice(WORDS[label].split(), 2)]
            lines.append(json.dumps({"text": " ".join(words), "label": label}))
        (folder / "texts.jsonl").write_text("\n".join(lines))
    comm.Barrier()
    task = "sequence-classification"
    source = (str(folder / "texts.jsonl"),)
    options = PrepareOptions(source, folder / "data", tokenizer="bytes", validation=0.3, task=task)
    prepare(options, comm, Console(speaks=False))
    return Manifest.load(folder / "data")


def scored(manifest: Manifest) -> tuple[dict[str, Score], list[tuple[list[str], np.ndarray]]]:
    """Return the scores of the baselines, with the texts and labels of both splits."""
    spec = read_spec({"architecture": "lstm", "layers": 1, "width": 8, "context": 64})
    vocabulary = Vocabulary(257, classes=manifest.classes)
    task = make_task("sequence-classification", vocabulary=vocabulary)
    with open_of(manifest, "train") as train, open_of(manifest, "validation") as held_out:
        assert isinstance(train, PairReader)
        assert isinstance(held_out, PairReader)
        row = RowShape.of(task, Lengths.of(spec))
        tokenizer, metrics = byte_tokenizer(), make_metrics(["loss", "accuracy", "macro-f1"])
        texts = [read_texts(each, row, tokenizer) for each in (train, held_out)]
        scores = score_text_baselines(
            train, held_out, tokenizer, task, spec, metrics, MPI.COMM_SELF
        )
    return scores, texts


def test_the_figures_are_those_of_scikit_learn(folder: Path, comm: MPI.Intracomm) -> None:
    manifest = prepared(folder, CLASSES, comm)
    scores, [(texts, labels), (tested, targets)] = scored(manifest)
    lines = map(json.loads, (folder / "texts.jsonl").read_text().splitlines())
    known = {line["text"]: line["label"] for line in lines}
    assert len(texts) + len(tested) == len(known)
    for text, label in zip(texts + tested, [*labels, *targets], strict=True):
        assert known[text] == manifest.classes[label]
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    model.fit(texts, labels)
    found, shares = model.predict(tested), model.predict_proba(tested)
    ours = scores["TF-IDF"]
    assert ours.rows == len(tested)
    assert ours.values["accuracy"] == pytest.approx((found == targets).mean())
    assert ours.values["macro-f1"] == pytest.approx(f1_score(targets, found, average="macro"))
    assert ours.loss == pytest.approx(log_loss(targets, shares, labels=range(3)))
    assert scores["bag of words"].values["accuracy"] > 0.6
    assert scores["Word2Vec"].values["accuracy"] > 0.5


def test_one_class_alone_is_refused(folder: Path, comm: MPI.Intracomm) -> None:
    manifest = prepared(folder, CLASSES[:1], comm)
    with pytest.raises(DataError, match="of one class alone; prepare data with more, or leave"):
        scored(manifest)
