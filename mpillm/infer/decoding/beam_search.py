"""Beam search: the likeliest texts of several rows, as `generate` of transformers finds them.

The score of a text is the sum of its tokens' log-probabilities, its end included, divided by their
number ^ length penalty (Wu et al. 2016, without their constants). A row is done when its best open
beam, at its present length, does not exceed the worst of as many finished texts.

Shapes: N rows, W beams of a row, K candidates of a row, V vocabulary, T tokens so far.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpillm.infer.decoding.token_rows import TokenRows

# Below any score: in place of a beam that is not there.
NOTHING = -1e9


class _Candidates(NamedTuple):
    """The likeliest tokens after the beams of each row, the best one first, on the CPU."""

    scores_NK: Tensor
    beams_NK: Tensor
    """The beam that each follows, from 0 in each row."""
    tokens_NK: Tensor

    def at(self, places_NW: Tensor) -> "_Candidates":
        return _Candidates(*(each.gather(1, places_NW) for each in self))


def search_beams(
    rows: TokenRows,
    beams: int,
    length_penalty: float,
    ends: frozenset[int],
    most: Sequence[int],
) -> list[list[int]]:
    """Find the best text of each row, up to one of `ends`, which is left out, or `most` tokens."""
    found: list[list[int]] = [[] for _ in most]
    search, left = _BeamSearch(rows, beams, length_penalty, ends), list(range(len(most)))
    while left:
        done = search.step([most[row] for row in left])
        for place, row in enumerate(left):
            if done[place]:
                found[row] = [token for token in search.best(place) if token not in ends]
        left = [row for place, row in enumerate(left) if not done[place]]
        if left:
            search.keep([place for place, ended in enumerate(done) if not ended])
    return found


class _BeamSearch:
    """The open beams of the rows that are not done, and their finished texts."""

    def __init__(
        self, rows: TokenRows, beams: int, length_penalty: float, ends: frozenset[int]
    ) -> None:
        self._rows, self._beams, self._penalty = rows, beams, length_penalty
        self._ends = torch.tensor(sorted(ends), dtype=torch.int64)
        # A beam has a candidate for each end at most: so many leave enough that are not ended.
        self._count = max(2, 1 + len(ends)) * beams
        self._scores_NW = torch.full((len(rows), beams), NOTHING)
        # All beams of a row begin alike: only the first of them counts.
        self._scores_NW[:, 0] = 0
        self._texts_NWT = torch.zeros((len(rows), beams, 0), dtype=torch.int64)
        self._finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(len(rows))]

    def step(self, most: Sequence[int]) -> list[bool]:
        """Append a token to each open beam; return whether each row is done."""
        found, length = self._candidates(), self._texts_NWT.shape[2] + 1
        last_N = torch.tensor(most) <= length
        ended_NK = torch.isin(found.tokens_NK, self._ends) | last_N[:, None]
        # Not the candidates beyond: they are there in place of those that ended.
        self._finish(found.at(_first(len(most), self._beams)), ended_NK[:, : self._beams], length)
        scores_NK = found.scores_NK + ended_NK * NOTHING
        opened = found._replace(scores_NK=scores_NK).at(scores_NK.topk(self._beams).indices)
        self._scores_NW = opened.scores_NK
        texts_NWT = self._texts_of(opened.beams_NK)
        self._texts_NWT = torch.cat([texts_NWT, opened.tokens_NK[..., None]], 2)
        self._rows.select(self._row_numbers(opened.beams_NK))
        self._rows.push(opened.tokens_NK.flatten())
        best = (self._scores_NW[:, 0] / length**self._penalty).tolist()
        ended = zip(last_N.tolist(), best, self._finished, strict=True)
        return [
            last or (len(texts) == self._beams and score <= texts[-1][0])
            for last, score, texts in ended
        ]

    def best(self, place: int) -> list[int]:
        """Return the best finished text of the row at `place`, with its end."""
        return self._finished[place][0][1]

    def keep(self, places: Sequence[int]) -> None:
        """Keep the rows at these places alone."""
        places_N = torch.tensor(places)
        every_NW = _first(len(places), self._beams)
        self._rows.select((places_N[:, None] * self._beams + every_NW).flatten())
        self._scores_NW, self._texts_NWT = self._scores_NW[places_N], self._texts_NWT[places_N]
        self._finished = [self._finished[place] for place in places]

    def _candidates(self) -> _Candidates:
        logits_BV, rows = self._rows.logits(), len(self._scores_NW)
        if len(logits_BV) == rows and self._beams > 1:
            # The first time: a prompt is computed once for all beams of its row.
            repeats_B = torch.arange(rows).repeat_interleave(self._beams)
            logits_BV = logits_BV[repeats_B.to(logits_BV.device)]
            self._rows.select(repeats_B)
        scores_BV = logits_BV.log_softmax(-1)
        scores_BV = scores_BV + self._scores_NW.view(-1, 1).to(scores_BV.device)
        vocabulary = scores_BV.shape[1]
        scores_NX = scores_BV.view(rows, -1)
        scores_NK, places_NK = scores_NX.topk(min(self._count, scores_NX.shape[1]))
        places_NK = places_NK.cpu()
        return _Candidates(scores_NK.cpu(), places_NK // vocabulary, places_NK % vocabulary)

    def _finish(self, found: _Candidates, ended_NW: Tensor, length: int) -> None:
        """Keep the best of the texts that have ended, as many as there are beams."""
        scores_NW = found.scores_NK / length**self._penalty
        texts_NWT = self._texts_of(found.beams_NK)
        for row, beam in torch.nonzero(ended_NW).tolist():
            text = [*texts_NWT[row, beam].tolist(), int(found.tokens_NK[row, beam])]
            self._finished[row].append((float(scores_NW[row, beam]), text))
        for texts in self._finished:
            texts.sort(key=lambda scored: -scored[0])
            del texts[self._beams :]

    def _texts_of(self, beams_NW: Tensor) -> Tensor:
        return self._texts_NWT[torch.arange(len(beams_NW))[:, None], beams_NW]

    def _row_numbers(self, beams_NW: Tensor) -> Tensor:
        """Return the numbers of the beams among those of all rows."""
        return (torch.arange(len(beams_NW))[:, None] * self._beams + beams_NW).flatten()


def _first(rows: int, count: int) -> Tensor:
    """Number the first `count` places of each row, (N, W)."""
    return torch.arange(count).expand(rows, count)
