"""The F1 score of whole entities in tags of BIO, as seqeval and conlleval count it."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

import numpy as np

from mpillm.errors import UsageError
from mpillm.system.messages import some_of
from mpillm.tasks.metrics.metric import Array, Arrays, Metric, Totals

OUTSIDE = "O"
Entity = tuple[str, int, int]
"""The kind, the first word and the word after the last."""


class EntityF1(Metric):
    """Micro F1 of entities: one is found where its kind, its first and its last word are right.

    Classes are `O`, `B-KIND` and `I-KIND`. An entity may begin with `I-`, as in seqeval.
    """

    name: ClassVar[str] = "entity-f1"
    title: ClassVar[str] = "entity F1"
    output_kinds: ClassVar[tuple[str, ...]] = ("a class of each position",)

    def __init__(self, classes: Sequence[str] = ()) -> None:
        """Read the tags `classes`, in the order of their numbers."""
        self._classes = tuple(classes)

    @classmethod
    def make(cls, classes: Sequence[str] = ()) -> Self:
        if odd := [name for name in classes if name != OUTSIDE and name[:2] not in ("B-", "I-")]:
            raise UsageError(
                f"entity-f1 needs the classes O, B-KIND and I-KIND, and the data has "
                f"{some_of(odd)}; take accuracy or macro-f1"
            )
        return cls(classes)

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        found_BT, targets_BT = outputs[0].argmax(-1), fields["targets"]
        counts_BT = fields["counts"].astype(bool)
        statistics = []
        for found, targets, counts in zip(found_BT, targets_BT, counts_BT, strict=True):
            ours, theirs = (
                set(entities([self._classes[number] for number in each[counts].tolist()]))
                for each in (found, targets)
            )
            statistics.append((len(ours & theirs), len(ours), len(theirs)))
        return np.array(statistics)

    def value(self, sums: Array, totals: Totals) -> float:
        both, found, there = sums
        return float(2 * both / max(found + there, 1.0))


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """Yield the entities of the tags of a sentence, in order."""
    first, kind = 0, ""
    for place, tag in enumerate((*tags, OUTSIDE)):
        begin, own = tag[0], tag[2:]
        if kind and (begin in "BO" or own != kind):
            yield kind, first, place
            kind = ""
        if begin != OUTSIDE and not kind:
            first, kind = place, own
