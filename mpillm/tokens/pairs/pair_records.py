"""Records to pairs: the source and the target of JSON lines, by the kind of the dataset."""

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mpillm.errors import DataError
from mpillm.system.messages import explain
from mpillm.tokens.chat.chat_encoder import ChatEncoder, ChatTokens, learnt_part
from mpillm.tokens.chat.chat_formats import Conversation, conversation_of, words_of
from mpillm.tokens.chat.preference_formats import preference_of
from mpillm.tokens.losses import LossCheck
from mpillm.tokens.pairs.pair_reader import NO_LABEL
from mpillm.tokens.pairs.pair_shards import PAIR_KINDS, REJECTED, PairKind
from mpillm.tokens.pairs.pictures import picture_of
from mpillm.tokens.pairs.questions import QuestionEncoder, question_of
from mpillm.tokens.pairs.sound import sound_frames
from mpillm.tokens.sources import SourcePiece, lines_of, place_of_line
from mpillm.tokens.text.records import HALF, MISSING, RecordError, field_of, object_of, parsed
from mpillm.tokens.text.tables import read_table
from mpillm.tokens.tokenizer import Tokenizer

Array = np.ndarray[Any, np.dtype[Any]]
# The fields of each kind where no option names others.
DEFAULT_FIELDS = MappingProxyType(
    {
        # Those of a prompt and an answer; without an option the format's own.
        "chat": ("prompt", "completion"),
        # Their formats alone.
        "preference": ("chosen", "rejected"),
        "kto": ("completion", "label"),
        "seq2seq": ("source", "target"),
        "sequence-classification": ("text", "label"),
        "multi-label-classification": ("text", "labels"),
        "question-answering": ("context", "answers"),
        "regression": ("text", "label"),
        "token-classification": ("tokens", "tags"),
        "image-classification": ("image", "label"),
        "ctc": ("audio", "text"),
        "speech-to-text": ("audio", "text"),
    }
)
LARGEST_CLASSES = 1 << 20
LARGEST_NUMBER = float(np.finfo(np.float32).max)
# A wrong value in a message: enough to find it.
_SHORT = reprlib.Repr()
Label = str | int


@dataclass(frozen=True)
class PairRecord:
    """A record's two values, checked by kind, and its place for messages.

    `replaced` counts places of its line that are no text, `halves` those of characters in JSON. Of
    preferences, the source is the chosen conversation and the target the rejected one, if any.
    """

    piece: SourcePiece
    offset: int
    source: Any
    target: Any
    replaced: int = 0
    halves: int = 0

    @property
    def place(self) -> str:
        """The file and the line, for messages."""
        return place_of_line(self.piece, self.offset)

    @property
    def conversations(self) -> list[Conversation]:
        """The conversations of a chat, or of its preferences, the chosen one first."""
        return [each for each in (self.source, self.target) if isinstance(each, dict)]

    @property
    def folder(self) -> Path:
        """The folder in which the record's paths begin: that of its file."""
        return Path(self.piece.path).parent


def read_records(
    piece: SourcePiece, kind: str, fields: Sequence[str], form: str = ""
) -> Iterator[PairRecord]:
    """Yield the records of a piece. Raises DataError with file and line.

    `form`: of conversations, their format; `fields` are then those that an option names.
    """
    for offset, record, replaced in raw_records(piece):
        source: Any
        target: Any
        try:
            if PAIR_KINDS[kind].is_preference:
                found = preference_of(record, form)
                source, target, a, b = found.chosen, found.rejected, found.halves, 0
            elif PAIR_KINDS[kind].is_chat:
                (source, a), (target, b) = conversation_of(record, form, fields), ("", 0)
            elif PAIR_KINDS[kind].target == "answer":
                # A half becomes one character, so that the places of answers stay.
                texts, target = question_of(record, fields)
                (source, a), b = _whole(texts), 0
            else:
                (source, a), (target, b) = map(_whole, _sides(record, PAIR_KINDS[kind], fields))
        except RecordError as failure:
            raise DataError(f"{place_of_line(piece, offset)} {failure}") from failure
        yield PairRecord(piece, offset, source, target, replaced, a + b)


def raw_records(piece: SourcePiece) -> Iterator[tuple[int, Any, int]]:
    """Yield the records of a piece as they are written; blank lines have none.

    Each with its byte offset, or its number in a table, and its count of places that are no text.
    Raises DataError with file and line.
    """
    offset = 0
    try:
        if piece.table:
            given = Path(piece.path), piece.table, piece.encoding, piece.partner
            for offset, record in read_table(*given):
                yield offset, record, 0
            return
        with Path(piece.path).open("rb") as file:
            for offset, line, replaced in lines_of(piece, file):
                if line.strip():
                    yield offset, parsed(line), replaced
    except RecordError as failure:
        # A table fails at the record after the last one.
        place = place_of_line(piece, offset + bool(piece.table))
        raise DataError(f"{place} {failure}") from failure
    except OSError as failure:
        raise DataError(f"cannot read the source {explain(failure, piece.path)}") from failure


def _sides(record: Any, sides: PairKind, fields: Sequence[str]) -> tuple[Any, Any]:
    record = object_of(record)
    values = []
    for name, option in zip(fields, ("--source-field", "--target-field"), strict=True):
        value = field_of(record, name)
        if value is MISSING or value is None:
            known = ", ".join(sorted(record)[:8]) or "nothing"
            raise RecordError(f'has no field "{name}" (it has {known}); name another by {option}')
        values.append(value)
    source, target = values
    if sides.target == "labels":
        _check_words(source, target, fields)
        return source, [_label(each, fields[1]) for each in target]
    if sides.source in ("source", "frames"):
        source = _text(source, fields[0])
    return source, TARGETS[sides.target](target, fields[1])


def _check_words(words: Any, tags: Any, fields: Sequence[str]) -> None:
    if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
        raise RecordError(
            f'needs a list of words in "{fields[0]}" and as many labels in "{fields[1]}"'
        )
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise RecordError(f'has something in "{fields[0]}" that is no word')


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecordError(f'has no text in "{name}"; write one, or leave the record out')
    return value


def _whole(value: Any) -> tuple[Any, int]:
    """Replace halves of characters, which cannot be encoded, in a text or a list of words."""
    if isinstance(value, str):
        return HALF.subn("\ufffd", value)
    if not (isinstance(value, list) and value and isinstance(value[0], str)):
        return value, 0
    words = [HALF.subn("\ufffd", word) if isinstance(word, str) else (word, 0) for word in value]
    return [word for word, _ in words], sum(count for _, count in words)


def _label(value: Any, name: str) -> Label:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_CLASSES:
        return value
    raise RecordError(
        f'has no label in "{name}": a text, or a number from 0 to {LARGEST_CLASSES - 1:,}'
    )


def _label_set(value: Any, name: str) -> list[Label]:
    """Read the labels of a record: a list, or a text with commas between; none is a set, too."""
    if isinstance(value, str):
        value = [part for each in value.split(",") if (part := each.strip())]
    labels = value if isinstance(value, list) else [value]
    return sorted(
        {_label(each, name) for each in labels},
        key=lambda label: (str(label), isinstance(label, str)),
    )


def _real(value: Any, name: str) -> float:
    """Read a number, also one that a table holds as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    # A shard holds float32.
    if not abs(number) <= LARGEST_NUMBER:
        raise RecordError(
            f'has no number in "{name}" (it is {_SHORT.repr(value)}); write a finite one, such as '
            "3.5, or leave the record out"
        )
    return number


TARGETS: Mapping[str, Callable[[Any, str], Any]] = MappingProxyType(
    {"target": _text, "label": _label, "classes": _label_set, "number": _real}
)


def class_names(labels: set[Label]) -> tuple[str, ...]:
    """Order the classes: numbers by themselves, from 0; texts by their sorted list.

    Raises DataError for a mixture.
    """
    if not labels:
        return ()
    if all(isinstance(label, int) for label in labels):
        return tuple(map(str, range(max(map(int, labels)) + 1)))
    if all(isinstance(label, str) for label in labels):
        names = tuple(sorted(map(str, labels)))
        if len(names) > LARGEST_CLASSES:
            raise DataError(
                f"the labels have {len(names):,} texts, and {LARGEST_CLASSES:,} may be classes; "
                "name another --target-field"
            )
        return names
    texts = sorted(label for label in labels if isinstance(label, str))
    numbers = sorted(label for label in labels if isinstance(label, int))
    raise DataError(
        f"some labels are numbers, such as {numbers[0]}, and others texts, such as {texts[0]!r}; "
        "write all of them alike"
    )


def _number(record: PairRecord, label: Label, numbers: dict[str, int]) -> int:
    """Return the number of a label. Raises DataError for one that the first reading did not see."""
    if str(label) not in numbers:
        raise DataError(
            f"{record.place} has the label {label!r}, which was not there when the sources were "
            "first read: they change while they are read; start again when they are whole"
        )
    return numbers[str(label)]


@dataclass(frozen=True)
class PairEncoder:
    """Make the arrays of records: `losses` sees each text with its ids."""

    kind: str
    tokenizer: Tokenizer
    classes: tuple[str, ...]
    losses: LossCheck
    chat: ChatEncoder | None = None
    questions: QuestionEncoder | None = None

    def rows(
        self, numbered: Sequence[tuple[int, PairRecord]], pool: Executor
    ) -> list[list[tuple[Array, Array]]]:
        """Return the source and the target of each row of each record: of questions several.

        Raises DataError with file and line.
        """
        if self.questions is None:
            return [[pair] for pair in self.encode([record for _, record in numbered], pool)]
        found = []
        for number, record in numbered:
            try:
                found.append(self.questions.rows(record.source, record.target, number))
            except RecordError as failure:
                raise DataError(f"{record.place} {failure}") from failure
        if not self.tokenizer.keeps_all:
            texts = [text for _, record in numbered for text in record.source]
            self.losses.see(texts, self.tokenizer.encode_batch(texts))
        return found

    def encode(self, records: Sequence[PairRecord], pool: Executor) -> list[tuple[Array, Array]]:
        """Return the source and the target of each record; `pool` reads the files that it names.

        Raises DataError with file and line.
        """
        sides = PAIR_KINDS[self.kind]
        if sides.is_chat:
            return self._encode_chats(records)
        numbers = {name: number for number, name in enumerate(self.classes)}
        if sides.target == "labels":
            return self._encode_words(records, numbers)
        if sides.target == "label":
            targets = [np.array([_number(r, r.target, numbers)], "<i4") for r in records]
        elif sides.target == "classes":
            targets = [np.array([_number(r, e, numbers) for e in r.target], "<i4") for r in records]
        elif sides.target == "number":
            targets = [np.array([r.target], "<f4") for r in records]
        else:
            # A loss over alignments knows no end of a row.
            plain = self.kind == "ctc"
            texts = [record.target for record in records]
            targets = self._texts(texts, marked=not plain, closed=not plain)
        if sides.source == "source":
            sources = self._texts([record.source for record in records], marked=True)
        else:
            sources = list(pool.map(self._medium, records))
        return list(zip(sources, targets, strict=True))

    def _encode_chats(self, records: Sequence[PairRecord]) -> list[tuple[Array, Array]]:
        """Encode conversations, each up to its last token that is learnt."""
        assert self.chat is not None
        made: list[tuple[Array, Array]] = []
        for record in records:
            try:
                found = [learnt_part(self.chat.tokens(each)) for each in record.conversations]
            except RecordError as failure:
                raise DataError(f"{record.place} {failure}") from failure
            if record.target:
                found[-1] = ChatTokens(found[-1].ids, found[-1].supervised | np.uint8(REJECTED))
            ids, marks = (np.concatenate(each) for each in zip(*found, strict=True))
            made.append((ids, marks))
        if not self.tokenizer.keeps_all:
            texts = [text for r in records for each in r.conversations for text in words_of(each)]
            self.losses.see(texts, self.tokenizer.encode_batch(texts))
        return made

    def _texts(self, texts: list[str], marked: bool, closed: bool = False) -> list[Array]:
        """Encode texts: `marked` ones with the post-processor's tokens. `closed` ones end with the
        end of text where it ends them by none.
        """
        marked = marked and self.tokenizer.marks_rows
        if marked:
            found = [ids for ids, _ in self.tokenizer.encode_rows(texts)]
        else:
            found = list(self.tokenizer.encode_batch(texts))
        if closed and not (marked and self.tokenizer.closes_rows):
            end = np.array([self.tokenizer.eot_id], self.tokenizer.dtype)
            found = [np.concatenate((ids, end)) for ids in found]
        self.losses.see(texts, found)
        return found

    def _medium(self, record: PairRecord) -> Array:
        """Read a record's sound or picture."""
        try:
            if PAIR_KINDS[self.kind].source == "frames":
                return sound_frames(record.folder / record.source)
            return picture_of(record.source, record.folder)[None]
        except (RecordError, DataError) as failure:
            joint = " " if isinstance(failure, RecordError) else ": "
            raise DataError(f"{record.place}{joint}{failure}") from failure

    def _encode_words(
        self, records: Sequence[PairRecord], numbers: dict[str, int]
    ) -> list[tuple[Array, Array]]:
        """Label the token with the first character of each word; the others do not count."""
        made, texts = [], [" ".join(record.source) for record in records]
        encoded = self.tokenizer.encode_rows(texts)
        for record, (ids, spans) in zip(records, encoded, strict=True):
            labels = np.full(len(ids), NO_LABEL, "<i4")
            start = token = 0
            for word, tag in zip(record.source, record.target, strict=True):
                # Spans ascend but for those of added tokens, which are empty: [0, 0).
                while token < len(spans) and spans[token][1] <= start:
                    token += 1
                if token < len(spans) and spans[token][0] <= start:
                    labels[token] = _number(record, tag, numbers)
                start += len(word) + 1
            made.append((ids, labels))
        self.losses.see(texts, [ids for ids, _ in encoded])
        return made
