"""Rows of an evaluation set in the training text, against the plain way: sets of n-grams."""

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.errors import DataError, MismatchError, UsageError
from mpillm.infer.leakage import split_text
from mpillm.infer.leakage.contamination import Contamination, find_contamination
from mpillm.infer.leakage.ngram_search import NgramTable, ngram_hashes
from mpillm.infer.leakage.print_contamination import print_contamination
from mpillm.infer.leakage.split_text import BREAK, SplitText
from mpillm.system.console import Console
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.prepare import PrepareOptions, prepare

QUIET = Console(speaks=False)
N = 13
PLANTED = "the planted answer to a question of the evaluation set"


@pytest.fixture(scope="module")
def corpora(shared_folder: Path, comm: MPI.Intracomm) -> Path:
    """Text with passages of an evaluation set, the evaluation set, and pairs with some of them."""
    folder = shared_folder / "leakage"
    if comm.rank == 0:
        chance = random.Random(3)
        folder.mkdir()
        words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 6))) for _ in range(500)]

        def text(count: int) -> str:
            return " ".join(chance.choices(words, k=count))

        asked = [text(30) for _ in range(40)] + ["short"]
        trained = [text(200) for _ in range(60)]
        for number in (0, 5, 6):
            trained[number] += " " + asked[number][10:90] + " " + text(3)
        trained[7] = f"{PLANTED} {trained[7]} {PLANTED}"
        trained[9] += " " + asked[9]
        asked[20] = f"{asked[20]} {PLANTED}"
        for name, texts in (("trained", trained), ("asked", asked)):
            rows = "".join(json.dumps({"text": each}) + "\n" for each in texts)
            (folder / f"{name}.jsonl").write_text(rows)
        pairs = [{"text": each, "label": str(n % 2)} for n, each in enumerate(asked[:20])]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in pairs))
    comm.Barrier()
    for name in ("trained", "asked"):
        source, out = (str(folder / f"{name}.jsonl"),), folder / name
        share = 0.0 if name == "asked" else 0.05
        prepare(PrepareOptions(source, out, tokenizer="bytes", validation=share), comm, QUIET)
    source, task = (str(folder / "pairs.jsonl"),), "sequence-classification"
    options = PrepareOptions(source, folder / "pairs", tokenizer="bytes", validation=0.2, task=task)
    prepare(options, comm, QUIET)
    return folder


def rows_of(text: SplitText) -> list[list[list[int]]]:
    """Read the passages of each document, the plain way."""
    block = text.whole()
    rows: list[list[list[int]]] = [[] for _ in range(text.documents)]
    for number in range(text.documents):
        ids = block.ids_T[block.documents_T == number]
        edges = [-1, *np.flatnonzero(ids == BREAK).tolist(), len(ids)]
        rows[number] = [ids[a + 1 : b].tolist() for a, b in pairwise(edges)]
    return rows


def ngrams(passages: list[list[int]], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for ids in passages for i in range(len(ids) - n + 1)]


def found_in(
    folder: Path, evaluation: str, comm: MPI.Intracomm, n: int = N, most: int = 0
) -> tuple[Contamination, list[list[list[int]]], list[list[list[int]]]]:
    trained, asked = Manifest.load(folder / "trained"), Manifest.load(folder / evaluation)
    tokenizer = trained.load_tokenizer()
    with SplitText(asked, "train", tokenizer) as rows, SplitText(trained, "train", tokenizer) as t:
        found = find_contamination(rows, t, tokenizer, n, most, comm, QUIET)
        return found, rows_of(rows), rows_of(t)


@pytest.mark.parametrize(("evaluation", "n"), [("asked", 13), ("asked", 24), ("pairs", 13)])
def test_found_rows_are_those_with_a_common_ngram(
    corpora: Path, evaluation: str, n: int, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks that cut documents and n-grams, and several for each rank.
    monkeypatch.setattr(split_text, "BLOCK_TOKENS", 1000)
    monkeypatch.setattr(split_text, "BLOCK_PAIRS", 3)
    found, rows, trained = found_in(corpora, evaluation, comm, n)
    where: dict[tuple[int, ...], list[int]] = {}
    for number, passages in enumerate(trained):
        for each in ngrams(passages, n):
            where.setdefault(each, []).append(number)
    expected = {r for r, passages in enumerate(rows) if where.keys() & set(ngrams(passages, n))}
    assert {each.row for each in found.found} == expected
    assert found.rows == len(rows)
    assert found.short_rows == sum(not ngrams(passages, n) for passages in rows)
    for each in found.found:
        covered = set()
        for start, ids in enumerate(rows[each.row]):
            for place in range(len(ids) - n + 1):
                if tuple(ids[place : place + n]) in where:
                    covered |= {(start, place + step) for step in range(n)}
        assert each.covered == len(covered)
        assert each.tokens == sum(map(len, rows[each.row]))
        first = tuple(each.text.encode()[:n])
        assert each.times == len(where[first])
        assert each.document == where[first][0]
    if evaluation == "asked":
        assert any(PLANTED in each.text for each in found.found)
        assert found.short_rows == 1
    assert comm.allgather(found) == [found] * comm.size
    assert found == found_in(corpora, evaluation, MPI.COMM_SELF, n)[0]


def test_common_phrases_are_left_out(corpora: Path, comm: MPI.Intracomm) -> None:
    every, once = (found_in(corpora, "asked", comm, most=most)[0] for most in (0, 1))
    assert any(PLANTED in each.text for each in every.found)
    assert not any(PLANTED in each.text for each in once.found)
    assert once.common > 0


def test_hashes_of_equal_ngrams_are_equal_and_of_others_not() -> None:
    chance = np.random.default_rng(0)
    ids = chance.integers(0, 3, 400)
    ids[::50] = BREAK
    for n in range(1, 20):
        hashes, there = ngram_hashes(ids, n)
        known: dict[int, tuple[int, ...]] = {}
        for place in range(len(ids) - n + 1):
            own = tuple(ids[place : place + n].tolist())
            assert there[place] == (BREAK not in own)
            assert known.setdefault(int(hashes[place]), own) == own
        assert len(known) == len({tuple(ids[i : i + n].tolist()) for i in range(len(hashes))})


def test_a_hash_alone_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal hashes of unequal tokens, as an adversary could make them."""
    ids, others = np.arange(20), np.arange(20) + 50
    table = NgramTable(ids, 5)

    def same(ids_T: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        return table._hashes_G[:16], np.ones(16, bool)

    monkeypatch.setattr("mpillm.infer.leakage.ngram_search.ngram_hashes", same)
    assert len(table.matches(others)[0]) == 0


def test_what_is_printed_and_refused(
    corpora: Path, folder: Path, comm: MPI.Intracomm, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = folder / "rows.jsonl"
    trained, asked = corpora / "trained", corpora / "asked"
    given = N, 0, outputs, True, comm, Console(speaks=comm.rank == 0)
    print_contamination(trained, asked, *given)
    facts = json.loads(capsys.readouterr().out) if comm.rank == 0 else None
    facts = comm.bcast(facts)
    lines = [json.loads(line) for line in outputs.read_text().splitlines()]
    assert facts["rows_found"] == len(lines) > 3
    assert facts["split"] == "train"
    assert facts["examples"][0]["longest"] == max(each["longest"] for each in lines)
    with pytest.raises(UsageError, match="is there already"):
        print_contamination(trained, asked, *given)
    rest = None, False, comm, QUIET
    print_contamination(trained, None, N, 0, *rest)
    with pytest.raises(DataError, match=r"no row of .* has 4000 tokens .*; lower --tokens"):
        print_contamination(trained, asked, 4000, 0, *rest)
    with pytest.raises(UsageError, match="has no validation split, and all of its rows"):
        print_contamination(asked, None, N, 0, *rest)
    other = folder / "other"
    options = PrepareOptions((str(corpora / "asked.jsonl"),), other, vocab_size=300)
    prepare(options, comm, QUIET)
    with pytest.raises(MismatchError, match="was made with the tokenizer"):
        print_contamination(trained, other, N, 0, *rest)
