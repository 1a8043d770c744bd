"""Retrieval by embeddings, compared with scikit-learn, with plain lists, and over ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from sklearn.metrics import ndcg_score

from mpillm.errors import UsageError
from mpillm.infer.import_model import import_model
from mpillm.infer.loading import load_trained
from mpillm.infer.scores.score_retrieval import METRICS, ranked, score_retrieval
from mpillm.infer.sentence_embeddings import embed_texts
from mpillm.models.encoder import EncoderConfig
from mpillm.system.console import Console
from mpillm.tasks.metrics.metric_catalog import make_metrics
from tests.published import publish

QUIET = Console(speaks=False)


def test_metrics_equal_their_oracles_on_random_cases() -> None:
    chance = np.random.default_rng(6)
    metrics = {metric.name: metric for metric in make_metrics(METRICS)}
    for _ in range(1000):
        documents = int(chance.integers(2, 150))
        gains = chance.integers(0, 4, documents) * (chance.random(documents) < 0.3)
        if not gains.any():
            gains[chance.integers(documents)] = 1
        scores = chance.permutation(documents).astype(float)
        order = np.argsort(-scores)[:100]
        ideal = np.sort(gains)[::-1][:100]
        fields = {
            "gains": gains[order][None],
            "ideal": ideal[None],
            "relevant": np.array([(gains > 0).sum()]),
        }
        found = {name: float(each.of_rows((), fields)[0, 0]) for name, each in metrics.items()}
        expected = ndcg_score(gains[None], scores[None], k=10)
        assert found["ndcg@10"] == pytest.approx(expected, abs=1e-9)
        places = [place for place, number in enumerate(order, 1) if gains[number]]
        first = min(places, default=math.inf)
        assert found["mrr@10"] == (1 / first if first <= 10 else 0)
        for k in (1, 10, 100):
            share = sum(place <= k for place in places) / (gains > 0).sum()
            assert found[f"recall@{k}"] == pytest.approx(share)


def test_equal_similarities_are_in_the_order_of_documents() -> None:
    chance = np.random.default_rng(3)
    queries, documents = chance.integers(-2, 3, (20, 3)), chance.integers(-2, 3, (300, 3))
    slow = np.argsort(-(queries @ documents.T), axis=1, kind="stable")
    for longest in (1, 7, 100, 1000):
        assert (ranked(queries, documents, longest) == slow[:, :longest]).all()


def test_ranks_get_one_score(comm: MPI.Intracomm) -> None:
    chance = np.random.default_rng(5)
    documents = chance.normal(size=(500, 16)).astype(np.float32)
    queries = documents[:150] + chance.normal(size=(150, 16)).astype(np.float32)
    relevant = [{number: 1.0, (number + 7) % 500: 0.5} for number in range(150)]
    score = score_retrieval(queries, documents, relevant, comm)
    assert score == score_retrieval(queries, documents, relevant, MPI.COMM_SELF)
    assert comm.allgather(score) == [score] * comm.size
    assert score.rows == 150
    best = (queries @ documents.T).argmax(1)
    hits = np.mean([0.5 * (number in known) for number, known in zip(best, relevant, strict=True)])
    assert score.values["recall@1"] == pytest.approx(hits)
    assert 0.1 < score.values["recall@1"] <= 0.5
    interval = score.intervals["ndcg@10"]
    assert interval is not None
    assert interval[0] < score.values["ndcg@10"] < interval[1]
    # Fewer queries than ranks.
    alone = score_retrieval(queries[:1], documents, relevant[:1], comm, ["mrr@10"])
    assert alone.values["mrr@10"] in [0, *(1 / n for n in range(1, 11))]


def test_a_model_retrieves_the_text_itself(folder: Path, comm: MPI.Intracomm) -> None:
    pytest.importorskip("safetensors.torch")
    encoder = EncoderConfig(layers=1, width=32, heads=4, context=20, vocab_size=300, head="none")
    if comm.rank == 0:
        publish(folder / "hub", encoder.replace(token_types=2, head_layer="tanh"))
    comm.Barrier()
    import_model(folder / "hub", folder / "imported", comm, QUIET)
    loaded = load_trained(folder / "imported", comm, QUIET)
    # Of many lengths, so that there are several batches.
    texts = [f"{number:03d} {'word ' * (number % 40)}" for number in range(600)]
    vectors = embed_texts(loaded, texts, comm=comm)
    assert (vectors == embed_texts(loaded, texts)).all()
    score = score_retrieval(vectors[:40], vectors, [{n: 1.0} for n in range(40)], comm)
    assert score.values["recall@1"] > 0.9


def test_what_does_not_fit_is_refused(comm: MPI.Intracomm) -> None:
    vectors = np.eye(3, dtype=np.float32)
    known = [{0: 1.0}, {1: 1.0}, {2: 1.0}]
    for queries, relevant, message in (
        (vectors, [*known[:2], {}], "query 2 has no relevant document"),
        (vectors, [*known[:2], {3: 1.0}], "query 2 has the relevance 1.0 of document 3"),
        (vectors, [*known[:2], {2: 0.0}], "query 2 has the relevance 0.0 of document 2"),
        (vectors, known[:2], "there are 3 queries, and relevant documents of 2"),
        (vectors[:, :2], known, "queries have 2 numbers each and documents 3"),
        (vectors * np.nan, known, "the embedding of query 0 is not finite"),
        (vectors[:0], [], "there are 0 queries and 3 documents"),
    ):
        with pytest.raises(UsageError, match=message):
            score_retrieval(queries, vectors, relevant, comm)
    with pytest.raises(UsageError, match="the metric bleu reads texts"):
        score_retrieval(vectors, vectors, known, comm, ["bleu"])
