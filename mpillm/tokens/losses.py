"""What a tokenizer loses: text that does not come back from its ids.

Unknown tokens, and characters that a BPE without bytes drops, are counted over the whole text. All
else is found by decoding a sample of the documents again.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mpillm.errors import DataError
from mpillm.tokens.tokenizer import Ids, Tokenizer

if TYPE_CHECKING:
    from mpi4py import MPI

# Decoded again: all documents up to so many characters, then each of so many, with this much of it.
SAMPLE_CHARACTERS = 1 << 20
SAMPLE_EVERY = 64
PIECE_CHARACTERS = 1 << 16
EXAMPLE_CHARACTERS = 24
# A tokenizer whose encoding is a matter of chance would hardly encode this often alike.
REPEATS = 4


@dataclass
class Losses:
    """The losses of one rank, then of all: `checked` and `lost` count characters of the sample,
    `dropped` those of all `characters`.
    """

    characters: int = 0
    tokens: int = 0
    unknown: int = 0
    dropped: int = 0
    checked: int = 0
    lost: int = 0
    kinds: set[str] = field(default_factory=set)
    example: tuple[str, str] | None = None

    @property
    def share(self) -> float:
        """The largest share that is known to be lost, from 0 to 1."""
        pairs = (
            (self.dropped, self.characters),
            (self.lost, self.checked),
            (self.unknown, self.tokens),
        )
        return max(part / max(whole, 1) for part, whole in pairs)

    def describe(self) -> str:
        """Say what is lost and how much of it, with an example."""
        kinds = sorted(self.kinds)
        if self.unknown:
            kinds.append(f"{self.unknown:,} of {self.tokens:,} tokens are unknown")
        example = ""
        if self.example is not None:
            before, after = self.example
            example = f"; for example {before!r} comes back as {after!r}"
        return f"{self.share:.2g} of the text does not come back ({'; '.join(kinds)}){example}"


class LossCheck:
    """Compare texts with what comes back from their ids; a tokenizer of bytes needs no check."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.losses = tokenizer, Losses()
        self._needed = not tokenizer.keeps_all
        self._documents = 0
        # The characters seen, and those of them that vanish, alone or in part.
        self._seen: set[str] = set()
        self._dropped: set[str] = set()

    def see(self, texts: Sequence[str], encoded: Sequence[Ids]) -> None:
        """Take texts with their ids."""
        if not self._needed:
            return
        for text, ids in zip(texts, encoded, strict=True):
            if self._documents < REPEATS:
                self._repeat(text[:PIECE_CHARACTERS])
            self._count(text, ids)
            enough = self.losses.checked >= SAMPLE_CHARACTERS
            if not enough or self._documents % SAMPLE_EVERY == 0:
                self._compare(text, ids)
            self._documents += 1

    def _repeat(self, text: str) -> None:
        """Raise DataError where the same text gets other ids each time."""
        first = self.tokenizer.encode(text)
        if any(self.tokenizer.encode(text) != first for _ in range(REPEATS)):
            raise _by_chance(self.tokenizer.name, "the same text gets other ids each time")

    def _count(self, text: str, ids: Ids) -> None:
        found, tokenizer = self.losses, self.tokenizer
        found.characters += len(text)
        found.tokens += len(ids)
        if tokenizer.unknown_id is not None:
            unknown = int((ids == tokenizer.unknown_id).sum())
            found.unknown += unknown
            if unknown and found.example is None:
                self._compare(text, ids)
        elif tokenizer.drops_unknown:
            characters = set(text)
            for character in characters - self._seen:
                # A tokenizer may compose characters: the ohm sign is then an omega.
                back = _canonical(self._back(character))
                if not character.isspace() and _canonical(character) not in back:
                    self._dropped.add(character)
            self._seen |= characters
            dropped = sum(text.count(character) for character in characters & self._dropped)
            found.dropped += dropped
            if dropped:
                found.kinds.add("characters that the vocabulary lacks")
                if found.example is None:
                    self._compare(text, ids)

    def _compare(self, text: str, ids: Ids) -> None:
        """Decode one document, or the beginning of a long one, and compare."""
        if len(text) > PIECE_CHARACTERS:
            text = text[:PIECE_CHARACTERS]
            back = self._back(text)
        else:
            back = self.tokenizer.decode(ids)
        found = self.losses
        found.checked += len(text)
        before, after = _canonical(text), _canonical(back)
        if before == after:
            return
        given, returned = Counter(before), Counter(after)
        gone, new = (given - returned).total(), (returned - given).total()
        found.lost += max(gone, new, 1)
        found.kinds.add(kind_of_loss(before, after))
        if found.example is None:
            pairs = enumerate(zip(before, after, strict=False))
            equal = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
            start = max(equal - EXAMPLE_CHARACTERS // 4, 0)
            stop = start + EXAMPLE_CHARACTERS
            found.example = (before[start:stop], after[start:stop])

    def _back(self, text: str) -> str:
        return self.tokenizer.decode(self.tokenizer.encode(text))

    def total(self, comm: "MPI.Intracomm") -> Losses:
        """Add the losses of all ranks; the example is the first rank's. Every rank calls it."""
        total = Losses()
        for own in comm.allgather(self.losses):
            for name in ("characters", "tokens", "unknown", "dropped", "checked", "lost"):
                setattr(total, name, getattr(total, name) + getattr(own, name))
            total.kinds |= own.kinds
            total.example = total.example or own.example
        return total


def _canonical(text: str) -> str:
    """Make equal what is the same text: composed characters, and a space added at the beginning."""
    return unicodedata.normalize("NFC", text.removeprefix(" "))


def kind_of_loss(before: str, after: str) -> str:
    """Name what differs: letter case, white space, accents, or characters."""

    def spaceless(text: str) -> str:
        return "".join(text.split())

    def plain(text: str) -> str:
        decomposed = unicodedata.normalize("NFKD", text)
        return "".join(letter for letter in decomposed if not unicodedata.combining(letter))

    kinds = (
        ("letter case", (str.casefold,)),
        ("white space", (spaceless,)),
        ("letter case and white space", (str.casefold, spaceless)),
        ("accents and compatibility characters", (plain,)),
        ("letter case and accents", (str.casefold, plain)),
        ("letter case, accents and white space", (str.casefold, plain, spaceless)),
    )
    for name, steps in kinds:
        one, other = before, after
        for step in steps:
            one, other = step(one), step(other)
        if one == other:
            return name
    return "characters"


def check_chance(tokenizer: Tokenizer) -> None:
    """Raise DataError where the file makes the ids of a text a matter of chance."""
    if tokenizer.chance:
        raise _by_chance(tokenizer.name, tokenizer.chance)


def _by_chance(name: str, reason: str) -> DataError:
    return DataError(
        f"the tokenizer {name} encodes by chance ({reason}), so a dataset could not be made twice; "
        "take the sampling out of its tokenizer.json"
    )


def check_losses(losses: Losses, name: str) -> None:
    """Raise DataError where text is lost."""
    if losses.share:
        raise DataError(
            f"the tokenizer {name} loses text: {losses.describe()}; take a byte-level tokenizer "
            "(--tokenizer bpe trains one), or give --lossy to prepare the dataset anyway"
        )
