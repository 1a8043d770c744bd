"""Retrieval sets of BEIR's layout, and their faults with file and line."""

import json
from pathlib import Path

import pytest

from mpillm.errors import DataError
from mpillm.infer.scores.retrieval_set import read_retrieval_set

HEAD = "query-id\tcorpus-id\tscore\n"
DOCUMENTS = (
    {"_id": "d1", "title": "Foxes", "text": "Foxes are fast."},
    {"_id": "d2", "title": "", "text": "Bread is\u2028baked."},
    {"_id": "d3", "text": "Rain is wet."},
)
QUERIES = ({"_id": "q1", "text": "How fast?"}, {"_id": "q2", "text": "Bread?"})


def lines(rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)  # type: ignore[attr-defined]


def write_set(folder: Path, **files: str) -> Path:
    texts = {
        "corpus.jsonl": lines(DOCUMENTS),
        "queries.jsonl": lines(QUERIES),
        "qrels/test.tsv": f"{HEAD}q1\td1\t2\r\nq1\td3\t0\nq2\td2\t0\n",
        **{name.replace("_", "/", 1): text for name, text in files.items() if "tsv" in name},
        **{name: text for name, text in files.items() if "jsonl" in name},
    }
    (folder / "qrels").mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def test_a_set_is_read_as_beir_does(tmp_path: Path) -> None:
    found = read_retrieval_set(write_set(tmp_path / "set"), "test")
    assert found.documents == ("Foxes Foxes are fast.", "Bread is\u2028baked.", "Rain is wet.")
    assert found.document_names == ("d1", "d2", "d3")
    # A score of 0 is not relevant, so that q2 has no document to find.
    assert (found.queries, found.query_names) == (("How fast?",), ("q1",))
    assert found.relevant == ({0: 2.0},)
    assert found.unjudged == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"qrels_test.tsv": f"{HEAD}q9\td1\t1\n"}, "test.tsv, line 2: the query 'q9' is not in"),
        ({"qrels_test.tsv": f"{HEAD}q1\td9\t1\n"}, "line 2: the document 'd9' is not in"),
        ({"qrels_test.tsv": f"{HEAD}q1\td1\t1\nq1\td1\t1\n"}, "line 3: query 'q1' has .* twice"),
        ({"qrels_test.tsv": f"{HEAD}q1\td1\n"}, "line 2: it has 2 columns"),
        ({"qrels_test.tsv": f"{HEAD}q1\td1\t-1\n"}, "the score '-1' is below 0 or not numeric"),
        ({"qrels_test.tsv": f"{HEAD}q1\td1\tnan\n"}, "the score 'nan' is below 0 or not numeric"),
        ({"qrels_test.tsv": "q1\td1\t1\n"}, "its first line is 'q1"),
        ({"qrels_test.tsv": f"{HEAD}q1\td1\t0\n"}, "has no score above 0"),
        ({"corpus.jsonl": lines(DOCUMENTS * 2)}, "line 4: the _id 'd1' is there twice"),
        ({"corpus.jsonl": '{"_id": "d1"}\n'}, "line 1: it has no text 'text', but _id"),
        ({"corpus.jsonl": '{"_id": "d1", "text": " "}\n'}, "the text of 'd1' is empty"),
        ({"corpus.jsonl": '{"_id": "d", "text": "a", "title": 3}\n'}, "its title is no text"),
        ({"corpus.jsonl": "[1]\n"}, "line 1: it is no object"),
        ({"corpus.jsonl": "{\n"}, "line 1: it is no JSON"),
        ({"queries.jsonl": "\n"}, "queries.jsonl has no texts"),
    ],
)
def test_faults_are_named_with_their_place(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_retrieval_set(write_set(tmp_path / "set", **files), "test")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    with pytest.raises(DataError, match=r"dev\.tsv is not there; --split is one of test"):
        read_retrieval_set(folder, "dev")
    with pytest.raises(DataError, match=r"cannot read .*corpus\.jsonl"):
        read_retrieval_set(tmp_path, "test")
