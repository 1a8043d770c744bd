"""Rows of an evaluation set that share passages with the training text.

A row is contaminated where any of its n-grams of tokens is in the training text: of 13 as in GPT-3
(Brown et al. 2020, appendix C). The share of a row's tokens that such n-grams cover is reported,
too (Touvron et al. 2023, Llama 2, appendix A.6).

Shapes: T tokens of the evaluation set, N its rows, G distinct n-grams.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpillm.comm.failure import on_all
from mpillm.errors import DataError
from mpillm.infer.leakage.ngram_search import Bools, NgramCounts, NgramTable, search
from mpillm.infer.leakage.split_text import BREAK, Int64s, SplitText, TextBlock
from mpillm.system.console import Console
from mpillm.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mpi4py import MPI

# From this share of its tokens on a row is almost all there ("dirty" in Llama 2).
MOSTLY = 0.8


@dataclass(frozen=True)
class ContaminatedRow:
    """A row with passages of the training text, and the longest run of tokens that they cover."""

    row: int
    tokens: int
    covered: int
    longest: int
    text: str
    """The longest run, decoded."""
    times: int
    """How often the training text has the first n-gram of the longest run."""
    shard: str
    document: int
    """Where this n-gram is first: its shard, and the number of the document in it, from 0."""


@dataclass(frozen=True)
class Contamination:
    """The rows of an evaluation set that were found, and the counts of all."""

    n: int
    rows: int
    short_rows: int
    """Rows without a whole n-gram, which cannot be found."""
    tokens: int
    covered: int
    common: int
    """Distinct n-grams left out, as the training text has them too often."""
    found: tuple[ContaminatedRow, ...]

    @property
    def mostly(self) -> int:
        """The rows of whose tokens at least 80% are covered."""
        return sum(each.covered >= MOSTLY * each.tokens for each in self.found)

    def to_json(self) -> dict[str, object]:
        counts = {key: value for key, value in asdict(self).items() if key != "found"}
        return {**counts, "rows_found": len(self.found), "rows_mostly_found": self.mostly}


def find_contamination(
    evaluation: SplitText,
    training: SplitText,
    tokenizer: Tokenizer,
    n: int,
    most: int,
    comm: "MPI.Intracomm",
    console: Console,
) -> Contamination:
    """Find the rows of `evaluation` with an n-gram of `training`.

    `most`: n-grams that the training text has more often are common phrases, and left out; 0: none.
    Every rank calls it, and gets the same. Raises DataError where no row has `n` tokens.
    """
    block = on_all(comm, evaluation.whole)
    table = NgramTable(block.ids_T, n)
    if not len(table):
        raise DataError(
            f"no row of the {evaluation.name} split of {evaluation.manifest.folder} has {n} tokens "
            "without a special one among them; lower --tokens"
        )
    found = search(table, training, comm, console)
    common_G = (found.counts_G > most) & bool(most)
    begins_T = table.numbers_T >= 0
    hits_T = begins_T & ((found.counts_G > 0) & ~common_G)[table.numbers_T]
    covered_T = _covered(hits_T, n)
    tokens_N, covered_N, ngrams_N = (
        np.bincount(block.documents_T[mask], minlength=evaluation.documents)
        for mask in (block.ids_T != BREAK, covered_T, begins_T)
    )
    runs = _longest_runs(covered_T, block.documents_T)
    rows = [
        _row(number, run, (tokens_N, covered_N), (block, table, found), training, tokenizer)
        for number, run in sorted(runs.items())
    ]
    return Contamination(
        n,
        evaluation.documents,
        int((ngrams_N == 0).sum()),
        int(tokens_N.sum()),
        int(covered_N.sum()),
        int(common_G.sum()),
        tuple(rows),
    )


def _row(
    number: int,
    run: tuple[int, int],
    counts: tuple[Int64s, Int64s],
    searched: tuple[TextBlock, NgramTable, NgramCounts],
    training: SplitText,
    tokenizer: Tokenizer,
) -> ContaminatedRow:
    """Describe a row by its longest run of tokens, which begins with an n-gram that was found."""
    (first, length), (tokens_N, covered_N), (block, table, found) = run, counts, searched
    ngram = int(table.numbers_T[first])
    shard, document = training.place_of(int(found.documents_G[ngram]))
    return ContaminatedRow(
        number,
        int(tokens_N[number]),
        int(covered_N[number]),
        length,
        tokenizer.decode(block.ids_T[first : first + length]),
        int(found.counts_G[ngram]),
        shard,
        document,
    )


def _covered(hits_T: Bools, n: int) -> Bools:
    """Return which tokens an n-gram covers that begins where `hits_T` says."""
    changes = np.zeros(len(hits_T) + 1, np.int64)
    places = np.flatnonzero(hits_T)
    # No two n-grams begin at one place, nor end at one.
    changes[places] += 1
    changes[places + n] -= 1
    return changes[:-1].cumsum() > 0


def _longest_runs(covered_T: Bools, documents_T: Int64s) -> dict[int, tuple[int, int]]:
    """Return where the longest covered run of each document begins, and its length; the first of
    equal ones. A run ends where n-grams neither overlap nor follow each other.
    """
    edges = np.diff(np.concatenate(([0], covered_T, [0])).astype(np.int8))
    firsts, lasts = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    longest: dict[int, tuple[int, int]] = {}
    for first, length in zip(firsts.tolist(), (lasts - firsts).tolist(), strict=True):
        document = int(documents_T[first])
        if length > longest.get(document, (0, 0))[1]:
            longest[document] = first, length
    return longest
