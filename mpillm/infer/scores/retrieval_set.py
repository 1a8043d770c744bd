"""A retrieval set in the layout of BEIR (Thakur et al. 2021): documents, queries, relevances.

corpus.jsonl      {"_id": "d1", "title": "Foxes", "text": "Foxes are fast."}
queries.jsonl     {"_id": "q1", "text": "How fast is a fox?"}
qrels/test.tsv    query-id, corpus-id and score between tabs, below a line with these names
"""

import math
from dataclasses import dataclass
from pathlib import Path

from mpillm.errors import DataError
from mpillm.system.messages import some_of
from mpillm.system.strict_lines import read_given, strict_lines

CORPUS, QUERIES, RELEVANCES = "corpus.jsonl", "queries.jsonl", "qrels"
HEAD = ("query-id", "corpus-id", "score")


@dataclass(frozen=True)
class RetrievalSet:
    """Texts with their names, and of each query the relevance of documents by their numbers."""

    documents: tuple[str, ...]
    document_names: tuple[str, ...]
    queries: tuple[str, ...]
    query_names: tuple[str, ...]
    relevant: tuple[dict[int, float], ...]
    unjudged: int = 0
    """Queries of the file without a relevant document in the split, which are left out."""


def read_retrieval_set(folder: Path, split: str) -> RetrievalSet:
    """Read a folder of BEIR's layout. Raises DataError, which names the file and the line.

    As in BEIR a document's title goes ahead of its text, and queries without a relevant document in
    the split are left out.
    """
    documents = _texts(folder / CORPUS)
    queries = _texts(folder / QUERIES)
    numbers = {name: number for number, name in enumerate(documents)}
    path = _relevances(folder, split)
    known: dict[str, dict[int, float]] = {}
    for place, query, document, gain in _rows(path):
        if query not in queries:
            raise DataError(f"{place}: the query {query!r} is not in {folder / QUERIES}; add it")
        if document not in numbers:
            raise DataError(
                f"{place}: the document {document!r} is not in {folder / CORPUS}; add it"
            )
        number, of_query = numbers[document], known.setdefault(query, {})
        if number in of_query:
            raise DataError(f"{place}: query {query!r} has document {document!r} twice; keep one")
        of_query[number] = gain
    judged = {
        name: {number: gain for number, gain in known[name].items() if gain}
        for name in queries
        if any(known.get(name, {}).values())
    }
    if not judged:
        raise DataError(f"{path} has no score above 0, so no document to find; add one")
    asked = tuple(queries[name] for name in judged)
    return RetrievalSet(
        tuple(documents.values()),
        tuple(documents),
        asked,
        tuple(judged),
        tuple(judged.values()),
        len(queries) - len(judged),
    )


def _texts(path: Path) -> dict[str, str]:
    """Read the texts of a file by their names."""
    found: dict[str, str] = {}
    for place, line in strict_lines(path, ("_id", "text")):
        name, title = line["_id"], line.get("title") or ""
        if not isinstance(title, str):
            raise DataError(f"{place}: its title is no text; write one, or leave it out")
        if name in found:
            raise DataError(f"{place}: the _id {name!r} is there twice; each has one of its own")
        found[name] = f"{title} {line['text']}".strip()
        if not found[name]:
            raise DataError(f"{place}: the text of {name!r} is empty; leave the line out")
    if not found:
        raise DataError(f"{path} has no texts; write a line of JSON with _id and text for each")
    return found


def _relevances(folder: Path, split: str) -> Path:
    """Return the path of the relevances of a split. Raises DataError with those that are there."""
    path = folder / RELEVANCES / f"{split}.tsv"
    if not path.is_file():
        there = sorted(each.stem for each in (folder / RELEVANCES).glob("*.tsv"))
        raise DataError(
            f"{path} is not there; "
            + (f"--split is one of {some_of(there)}" if there else "write one")
        )
    return path


def _rows(path: Path) -> list[tuple[str, str, str, float]]:
    """Read the place, the query, the document and the relevance of each line."""
    lines = read_given(path).split("\n")
    if tuple(lines[0].strip("\r").split("\t")) != HEAD:
        raise DataError(f"{path}: its first line is {lines[0]!r}; write {' TAB '.join(HEAD)}")
    found = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        place, cells = f"{path}, line {number:,}", line.strip("\r").split("\t")
        if len(cells) != len(HEAD):
            raise DataError(f"{place}: it has {len(cells)} columns; write {' TAB '.join(HEAD)}")
        try:
            gain = float(cells[2])
        except ValueError:
            gain = math.nan
        if not 0 <= gain < math.inf:
            raise DataError(
                f"{place}: the score {cells[2]!r} is below 0 or not numeric; write 0 or more"
            )
        found.append((place, cells[0], cells[1], gain))
    return found
