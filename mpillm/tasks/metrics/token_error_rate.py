"""The edits from what is heard or written to the target, over its length: of tokens, of words."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, ClassVar

import numpy as np

from mpillm.errors import UsageError
from mpillm.tasks.metrics.metric import Array, Arrays, Metric, Totals, row_sums
from mpillm.tasks.metrics.text_metric import References, TextMetric


class TokenErrorRate(Metric):
    """Tokens inserted, deleted and replaced, a token of the targets; greedy decoding."""

    name: ClassVar[str] = "token-error-rate"
    title: ClassVar[str] = "token error rate"
    lower_is_better: ClassVar[bool] = True
    output_kinds: ClassVar[tuple[str, ...]] = ("aligned tokens",)

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        edits = [edit_distance(heard, said) for heard, said in _rows(outputs, fields)]
        return row_sums(np.array(edits))

    def value(self, sums: Array, totals: Totals) -> float:
        return float(sums[0]) / totals.weight


class WordErrorRate(TextMetric):
    """Words inserted, deleted and replaced, a word of the targets.

    Of sound it is that of a greedy decoding; of texts with several references that of the nearest.
    """

    name: ClassVar[str] = "word-error-rate"
    title: ClassVar[str] = "word error rate"
    lower_is_better: ClassVar[bool] = True
    output_kinds: ClassVar[tuple[str, ...]] = ("aligned tokens", "texts")

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        if "spaces" not in fields:
            raise UsageError(
                "word-error-rate needs a tokenizer whose space is a token of its own, such as "
                "`mpillm prepare --tokenizer bytes`; take token-error-rate"
            )
        space = int(fields["spaces"][0])
        rows = [[_words(side, space) for side in row] for row in _rows(outputs, fields)]
        return np.array([(edit_distance(heard, said), len(said)) for heard, said in rows])

    def of_texts(self, hypotheses: Sequence[str], references: References) -> Array:
        rows = []
        for ours, known in zip(hypotheses, references, strict=True):
            texts = [each.split() for each in known]
            edits = [(edit_distance(ours.split(), each), len(each)) for each in texts]
            rows.append(min(edits, key=lambda pair: pair[0] / max(1, pair[1])))
        return np.array(rows, np.float64).reshape(-1, 2)

    def value(self, sums: Array, totals: Totals) -> float:
        return float(sums[0] / max(1.0, sums[1]))


def _rows(outputs: Sequence[Array], fields: Arrays) -> Iterator[tuple[list[int], list[int]]]:
    """Yield what was heard and what was said, of each row."""
    best_BT = outputs[0].argmax(-1)
    for row, length in enumerate(fields["lengths"].tolist()):
        said: list[int] = fields["targets"][row][fields["counts"][row]].tolist()
        yield greedy(best_BT[row, :length]), said


def _words(tokens: list[int], space: int) -> list[tuple[int, ...]]:
    parts = groupby(tokens, space.__eq__)
    return [tuple(part) for is_space, part in parts if not is_space]


def greedy(best: Array) -> list[int]:
    """Drop repeats, then blanks, of the best output of each position."""
    changed = np.diff(best, prepend=-1) != 0
    found: list[int] = best[changed & (best != 0)].tolist()
    return found


def edit_distance(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Count the fewest insertions, deletions and replacements (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for number, token in enumerate(one, 1):
        corner, row[0] = row[0], number
        for place, wanted in enumerate(other, 1):
            replaced = corner + (token != wanted)
            corner = row[place]
            row[place] = min(replaced, corner + 1, row[place - 1] + 1)
    return row[-1]
