"""How much of its training text a model writes again: prompted with the tokens ahead of it.

The model continues the first tokens of a window of training text greedily. What it writes is
compared with the text itself, token by token up to the first difference (Carlini et al. 2023,
"Quantifying Memorization Across Neural Language Models"). Text that the model never saw is
continued, too: what it gets right there is predictable, and no memory.
"""

from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpillm.comm.failure import on_all
from mpillm.errors import DataError, MismatchError, UsageError
from mpillm.infer.decoding.token_rows import TokenRows, continue_rows
from mpillm.infer.decoding.write_answers import BATCH_POSITIONS, MOST_ROWS
from mpillm.infer.sampling import Sampling
from mpillm.infer.scores.bootstrap import REPLICATES, Interval, draw_weights, percentile_interval
from mpillm.models.part_module import PartModule
from mpillm.models.spec import ModelSpec
from mpillm.system.console import Console
from mpillm.tokens.order import permute
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.reader import TokenReader
from mpillm.tokens.windows import document_ends

if TYPE_CHECKING:
    from mpi4py import MPI

Int64s = np.ndarray[Any, np.dtype[np.int64]]
# Carlini et al. take 50 and 50; of a short context half and half.
USUAL_TOKENS = 50
# Windows whose document ends are searched at once.
PLANNED = 4096
# Windows that are searched at most: a split may have no document that is long enough.
MOST_TRIED = 1 << 20
# Of the normal distribution, for an interval of 95%.
QUANTILE = 1.959964


@dataclass(frozen=True)
class Passage:
    """Tokens of a text: the model is given the first of them, and should write the others."""

    number: int
    """Of the passage among those of all ranks, from 0."""
    place: int
    """Of its first token in the split, or of its conversation; of a text that a user names, its
    line.
    """
    prompt: list[int]
    expected: list[int]


@dataclass(frozen=True)
class Reproduction:
    """What the model wrote after a prompt, and how many of its first tokens are the text's."""

    passage: Passage
    written: list[int]

    @property
    def copied(self) -> int:
        pairs = zip(self.written, self.passage.expected, strict=False)
        return next((n for n, (one, other) in enumerate(pairs) if one != other), self._compared)

    @property
    def whole(self) -> bool:
        return self.copied == len(self.passage.expected)

    @property
    def _compared(self) -> int:
        return min(len(self.written), len(self.passage.expected))


@dataclass(frozen=True)
class Memorisation:
    """Figures of some passages, each with its 95% interval."""

    n: int
    whole_share: float
    whole_interval: Interval
    mean_copied: float
    mean_interval: Interval | None
    median_copied: float
    longest: int

    @classmethod
    def of(cls, found: Sequence[Reproduction]) -> "Memorisation":
        """Compute the figures of passages in the order of their numbers, one at least."""
        copied_N = np.array([each.copied for each in found], np.float64)
        whole = sum(each.whole for each in found)
        sums_R2 = np.zeros((REPLICATES, 2))
        for first in range(0, len(found), PLANNED):
            weights_RB = draw_weights(
                np.arange(first, min(first + PLANNED, len(found))), REPLICATES
            )
            copied_B = copied_N[first : first + PLANNED]
            sums_R2 += np.stack((weights_RB @ copied_B, weights_RB.sum(1)), -1)
        with np.errstate(invalid="ignore"):
            means_R = sums_R2[:, 0] / sums_R2[:, 1]
        return cls(
            len(found),
            whole / len(found),
            share_interval(whole, len(found)),
            float(copied_N.mean()),
            percentile_interval(means_R),
            float(np.median(copied_N)),
            int(copied_N.max()),
        )


def share_interval(count: int, of: int) -> Interval:
    """Return the 95% interval of a share (Wilson 1927): not empty where none or all were found."""
    share, squared = count / of, QUANTILE**2
    middle = (share + squared / (2 * of)) / (1 + squared / of)
    half = sqrt(share * (1 - share) / of + squared / (4 * of**2)) * QUANTILE / (1 + squared / of)
    # Of none or all, rounding would leave the bound a little off 0 or 1.
    low, high = (count and middle - half), (middle + half if count < of else 1.0)
    return max(0.0, low), min(1.0, high)


def passage_tokens(spec: ModelSpec, prompt: int | None, tokens: int | None) -> tuple[int, int]:
    """Return the tokens of a prompt, and of what follows it. None: 50, or what the context allows.

    Raises UsageError beyond the context, MismatchError for a model that continues no text.
    """
    if not spec.generates or spec.source_field:
        raise MismatchError(
            f"memorisation is of models that continue a text, and a model of the architecture "
            f"{spec.architecture} does not; name a run of a decoder"
        )
    half = max(1, spec.context // 2)
    found = prompt or min(USUAL_TOKENS, half), tokens or min(USUAL_TOKENS, half)
    # The last token is written, and never read.
    if sum(found) > spec.context + 1:
        raise UsageError(
            f"a prompt of {found[0]:,} tokens and {found[1]:,} after it are beyond the model's "
            f"context of {spec.context:,}; lower --prompt-tokens or --tokens"
        )
    return found


def sample_passages(
    reader: TokenReader | PairReader, count: int, lengths: tuple[int, int], seed: int
) -> list[Passage]:
    """Draw up to `count` passages of a split, each within one document, by the seed alone.

    Of conversations a passage is the beginning of one. Raises DataError where all documents are
    shorter.
    """
    whole = sum(lengths)
    if isinstance(reader, PairReader):
        places = _long_conversations(reader, whole, seed)[:count]
        rows = [reader.conversation(place, whole)[0] for place in places]
    else:
        places = _windows_in_documents(reader, whole, seed, count)
        rows = [np.empty(whole, reader.dtype) for _ in places]
        for place, row in zip(places, rows, strict=True):
            reader.read(place, row)
    if not places:
        tokens = isinstance(reader, TokenReader) and reader.n_tokens
        searched = f" at {MOST_TRIED:,} random places" if tokens > MOST_TRIED else ""
        raise DataError(
            f"the {reader.name} split has no document of {whole:,} tokens or more"
            f"{searched}; lower --prompt-tokens or --tokens"
        )
    ids = [row.tolist() for row in rows]
    return cut_passages(zip(places, ids, strict=True), lengths)


def cut_passages(rows: Iterable[tuple[int, list[int]]], lengths: tuple[int, int]) -> list[Passage]:
    """Cut rows of ids, each with its place, into prompts and what should follow."""
    prompt, whole = lengths[0], sum(lengths)
    return [
        Passage(number, place, ids[:prompt], ids[prompt:whole])
        for number, (place, ids) in enumerate(rows)
    ]


def reproduce(
    model: PartModule, passages: Sequence[Passage], comm: "MPI.Intracomm", console: Console
) -> list[Reproduction]:
    """Continue the prompts greedily. Every rank calls it with the same passages, and gets all.

    Ranks share out batches, which do not depend on their number. Raises CheckpointError on every
    rank where outputs are not finite.
    """
    longest = max(len(each.prompt) + len(each.expected) for each in passages)
    rows = max(1, min(MOST_ROWS, BATCH_POSITIONS // longest))
    batches = [passages[first : first + rows] for first in range(0, len(passages), rows)]

    def work() -> list[Reproduction]:
        found, own = [], batches[comm.rank :: comm.size]
        with console.progress("continue", sum(map(len, own)), "passages") as progress:
            for batch in own:
                found += _continue(model, batch)
                progress.advance(len(batch))
        return found

    every = [each for part in comm.allgather(on_all(comm, work)) for each in part]
    return sorted(every, key=lambda each: each.passage.number)


def _continue(model: PartModule, batch: Sequence[Passage]) -> list[Reproduction]:
    rows = TokenRows(model, [each.prompt for each in batch])
    # Greedy decoding draws nothing; an end of text is a token as any other.
    generators, sampling = [torch.Generator()] * len(batch), Sampling(temperature=0)
    most = [len(each.expected) for each in batch]
    written = continue_rows(rows, sampling, generators, frozenset(), most)
    return [Reproduction(each, ids) for each, ids in zip(batch, written, strict=True)]


def _windows_in_documents(reader: TokenReader, whole: int, seed: int, count: int) -> list[int]:
    """Draw places of `whole` tokens that no end of a document cuts, and that do not overlap.

    Each such place has the same chance, so a long document has more of them than a short one.
    """
    every = max(0, reader.n_tokens - whole + 1)
    tried, places, taken = min(every, MOST_TRIED), list[int](), list[int]()
    for first in range(0, tried, PLANNED):
        ids = np.arange(first, min(first + PLANNED, tried), dtype=np.int64)
        starts = permute(ids, every, seed, np.zeros_like(ids))
        _, splits = document_ends(reader, starts, whole)
        for start in starts[np.diff(splits) == 0].tolist():
            after = bisect(taken, start)
            if all(abs(start - near) >= whole for near in taken[max(0, after - 1) : after + 1]):
                taken.insert(after, start)
                places.append(start)
        if len(places) >= count:
            break
    return places[:count]


def _long_conversations(reader: PairReader, whole: int, seed: int) -> list[int]:
    every = np.arange(reader.n_pairs, dtype=np.int64)
    order = permute(every, reader.n_pairs, seed, np.zeros_like(every))
    return order[reader.lengths()[order] >= whole].tolist()  # type: ignore[no-any-return]
