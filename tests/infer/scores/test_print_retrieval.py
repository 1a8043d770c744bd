"""`evaluate --retrieval`: a model's figures over files, as tables, JSON and lists of documents."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.errors import UsageError
from mpillm.infer.import_model import import_model
from mpillm.infer.loading import load_trained
from mpillm.infer.scores.print_retrieval import RetrievalOptions, print_retrieval
from mpillm.infer.scores.score_retrieval import score_retrieval
from mpillm.infer.sentence_embeddings import embed_texts
from mpillm.models.encoder import EncoderConfig
from mpillm.system.console import Console
from mpillm.verbs.evaluate import Evaluate
from tests.published import publish

QUIET = Console(speaks=False)
TEXTS = [f"{number:03d} {'word ' * (number % 7)}".strip() for number in range(60)]


@pytest.fixture(scope="module")
def place(shared_folder: Path, comm: MPI.Intracomm) -> Path:
    """A model without training, and a set whose queries are documents."""
    pytest.importorskip("safetensors.torch")
    folder = shared_folder / "retrieval"
    encoder = EncoderConfig(layers=1, width=32, heads=4, context=40, vocab_size=300, head="none")
    if comm.rank == 0:
        folder.mkdir()
        publish(folder / "hub", encoder.replace(token_types=2, head_layer="tanh"))
        (folder / "set" / "qrels").mkdir(parents=True)
        for name, count in (("corpus", 60), ("queries", 31)):
            rows = [{"_id": f"{name[0]}{n}", "text": TEXTS[n]} for n in range(count)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "set" / f"{name}.jsonl").write_text(text)
        judged = "".join(f"q{n}\tc{n}\t1\n" for n in range(30))
        (folder / "set/qrels/test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    comm.Barrier()
    import_model(folder / "hub", folder / "model", comm, QUIET)
    return folder


def printed(place: Path, comm: MPI.Intracomm, models: int = 1, **options: Any) -> str:
    stream = io.StringIO()
    console = Console(speaks=comm.rank == 0, stream=stream)
    given = [place / "model"] * models, place / "set", RetrievalOptions(**options)
    print_retrieval(*given, comm, console, "cpu")
    return str(comm.bcast(stream.getvalue()))


def test_json_has_the_score_of_the_texts(place: Path, comm: MPI.Intracomm) -> None:
    found = json.loads(printed(place, comm, as_json=True))
    loaded = load_trained(place / "model", comm, QUIET)
    vectors = embed_texts(loaded, TEXTS)
    plain = score_retrieval(vectors[:30], vectors, [{n: 1.0} for n in range(30)], MPI.COMM_SELF)
    assert found["model"]["values"] == plain.values
    assert found["model"]["intervals"]["mrr@10"] == list(plain.intervals["mrr@10"] or ())
    assert (found["queries"], found["queries_left_out"], found["documents"]) == (30, 1, 60)


def test_two_models_are_compared_and_lists_are_kept(
    place: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    outputs = folder / "lists.jsonl"
    text = printed(place, comm, 2, outputs=outputs, metrics=["recall@1"], pooling="first")
    for part in ("recall@1", "difference", "n = 30 queries, 60 documents", "1 of 31 queries"):
        assert part in text
    rows = [json.loads(line) for line in outputs.read_text().splitlines()]
    assert [row["query"] for row in rows] == [f"q{n}" for n in range(30)]
    assert rows[0]["relevant"] == {"c0": 1.0}
    assert all(len(row["model"]) == 10 and row["model"] == row["other"] for row in rows)
    with pytest.raises(UsageError, match="--outputs"):
        printed(place, comm, outputs=outputs)


def test_a_metric_of_texts_is_refused(place: Path, comm: MPI.Intracomm) -> None:
    with pytest.raises(UsageError, match="the metric bleu reads texts"):
        printed(place, comm, metrics=["bleu"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"retrieval": Path("set"), "generate": True}, "--generate is not of --retrieval"),
        ({"retrieval": Path("set"), "data": Path("x")}, "--data is not of --retrieval"),
        ({"retrieval": Path("set"), "harness": (Path("x"),)}, "--harness is not of --retrieval"),
        ({"split": "dev"}, "--split is of --retrieval; name a folder"),
        ({"pooling": "first"}, "--pooling is of --retrieval; name a folder"),
    ],
)
def test_options_of_another_evaluation_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Evaluate(Path("run"), **given)
