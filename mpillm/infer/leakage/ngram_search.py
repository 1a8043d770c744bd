"""Find the n-grams of some text in another one, which ranks read side by side.

A hash of 64 bits finds candidates, and their tokens are compared. So what is found is there.

Shapes: T tokens, G distinct n-grams, M matches in a block.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpillm.comm.failure import on_all
from mpillm.infer.leakage.split_text import BREAK, Int64s, SplitText
from mpillm.system.console import Console
from mpillm.tokens.order import mix

if TYPE_CHECKING:
    from mpi4py import MPI

UInt64s = np.ndarray[Any, np.dtype[np.uint64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
# Of Knuth's MMIX generator: odd, so that no token is lost from a product of powers.
MULTIPLIER = 6364136223846793005
# The filter has 16 places an n-gram, so that one in 16 others passes: 16 MiB of it stay in a cache.
PLACES, MOST_BITS = 16, 28
# No document has this number: the n-gram was not found.
NOWHERE = np.iinfo(np.int64).max


class NgramCounts(NamedTuple):
    """How often each n-gram (G,) is in the text, and the first document that has it."""

    counts_G: Int64s
    documents_G: Int64s


class NgramTable:
    """The distinct n-grams of some text, which a search asks for."""

    def __init__(self, ids_T: Int64s, n: int) -> None:
        """Collect the n-grams of `ids_T`; none crosses a BREAK."""
        self.n, self._ids_T = n, ids_T
        hashes, there = ngram_hashes(ids_T, n)
        places = np.flatnonzero(there)
        self._hashes_G, firsts, numbers = np.unique(
            hashes[places], return_index=True, return_inverse=True
        )
        self.firsts_G: Int64s = places[firsts]
        """Where each n-gram begins first."""
        self.numbers_T = np.full(len(ids_T), -1, np.int64)
        """The number of the n-gram that begins at each place; -1: none does."""
        self.numbers_T[places] = numbers.reshape(-1)
        bits = min(MOST_BITS, max(10, (PLACES * max(1, len(firsts)) - 1).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, bool)
        self._filter[self._hashes_G >> self._shift] = True

    def __len__(self) -> int:
        return len(self._hashes_G)

    def matches(self, ids_T: Int64s) -> tuple[Int64s, Int64s]:
        """Return where n-grams of the table begin in a block, in order, and their numbers, (M,)."""
        hashes, there = ngram_hashes(ids_T, self.n)
        if not len(self) or not len(hashes):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        places = np.flatnonzero(there & self._filter[hashes >> self._shift])
        wanted = hashes[places]
        numbers = np.searchsorted(self._hashes_G, wanted).clip(max=len(self) - 1)
        same = self._hashes_G[numbers] == wanted
        places, numbers = places[same], numbers[same]
        # Two n-grams may share a hash, by chance or by design of a text: tokens decide.
        steps = np.arange(self.n)
        theirs, ours = places[:, None] + steps, self.firsts_G[numbers][:, None] + steps
        equal = (ids_T[theirs] == self._ids_T[ours]).all(1)
        return places[equal], numbers[equal]


def ngram_hashes(ids_T: Int64s, n: int) -> tuple[UInt64s, Bools]:
    """Hash the n-gram at each place, (T - n + 1,), and find those that cross no BREAK.

    A hash is a polynomial of the ids modulo 2^64, computed by doubling its length.
    """
    count = len(ids_T) - n + 1
    if count < 1:
        return np.empty(0, np.uint64), np.empty(0, bool)
    single = mix(ids_T.view(np.uint64))
    power = np.uint64(MULTIPLIER)
    hashes, length, factor = single, 1, power
    with np.errstate(over="ignore"):
        for bit in f"{n:b}"[1:]:
            hashes = hashes[:-length] * factor + hashes[length:]
            length, factor = 2 * length, factor * factor
            if bit == "1":
                hashes = hashes[:-1] * power + single[length : length + len(hashes) - 1]
                length, factor = length + 1, factor * power
    breaks = np.concatenate(([0], np.cumsum(ids_T == BREAK)))
    return hashes, breaks[n:] == breaks[:count]


def search(
    table: NgramTable, text: SplitText, comm: "MPI.Intracomm", console: Console
) -> NgramCounts:
    """Count the n-grams of `table` in a split. Every rank calls it, and gets the same numbers.

    Each rank reads every so many blocks. Raises DataError on every rank.
    """
    from mpi4py import MPI

    counts_G = np.zeros(len(table), np.int64)
    documents_G = np.full(len(table), NOWHERE)

    def work() -> None:
        own = range(comm.rank, text.blocks, comm.size)
        with console.progress("search", len(own), "blocks") as progress:
            for number in own:
                # An n-gram that begins in this block may end in the next one.
                block = text.read(number, table.n - 1)
                places, numbers = table.matches(block.ids_T)
                which, firsts, counts = np.unique(numbers, return_index=True, return_counts=True)
                counts_G[which] += counts
                found = block.documents_T[places[firsts]]
                documents_G[which] = np.minimum(documents_G[which], found)
                progress.advance(1)

    on_all(comm, work)
    comm.Allreduce(MPI.IN_PLACE, counts_G)
    comm.Allreduce(MPI.IN_PLACE, documents_G, MPI.MIN)
    return NgramCounts(counts_G, documents_G)
