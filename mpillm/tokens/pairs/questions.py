"""Questions on a context, as SQuAD has them: their records, and their rows of tokens.

A long context becomes several rows, each with the whole question and a span of the context; spans
overlap by the stride (Devlin et al. 2019). The target of a row is JSON: where the answer is, and
what an evaluation needs to write it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from mpillm.errors import UsageError
from mpillm.system.json_text import to_json
from mpillm.tokens.text.records import MISSING, RecordError, field_of, object_of
from mpillm.tokens.tokenizer import Tokenizer

Array = np.ndarray[Any, np.dtype[Any]]
# Of an answer in a message.
SHOWN = 60


def question_of(record: Any, fields: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """Return the question with its context, and each answer with its first character.

    `fields`: the names of the context and of the answers. No answer is one, too (SQuAD 2). Raises
    RecordError.
    """
    record = object_of(record)
    texts = []
    for name in ("question", fields[0]):
        value = field_of(record, name)
        if not isinstance(value, str) or not value.strip():
            known = ", ".join(sorted(record)[:8]) or "nothing"
            raise RecordError(f'has no text in "{name}" (it has {known})')
        texts.append(value)
    answers = field_of(record, fields[1])
    if answers is MISSING or answers is None:
        known = ", ".join(sorted(record)[:8]) or "nothing"
        raise RecordError(f'has no field "{fields[1]}" (it has {known})')
    return texts, [_checked(text, start, texts[1]) for text, start in _pairs(answers, fields[1])]


def _pairs(answers: Any, name: str) -> list[tuple[Any, Any]]:
    """Read answers as a list of objects, or as an object of two lists."""
    keys = ("text", "answer_start")
    if isinstance(answers, Mapping):
        texts, starts = (answers.get(key) for key in keys)
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            return list(zip(texts, starts, strict=True))
    elif isinstance(answers, list) and all(isinstance(each, Mapping) for each in answers):
        return [(each.get(keys[0]), each.get(keys[1])) for each in answers]
    raise RecordError(
        f'needs in "{name}" as many "text" as "answer_start": lists of both, or a list of objects '
        "with both"
    )


def _checked(text: Any, start: Any, context: str) -> list[Any]:
    if not isinstance(text, str) or not text.strip():
        raise RecordError("has an answer without a text; leave it out of the list")
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        raise RecordError(
            f"has the answer_start {start!r}; write the number of a character, from 0"
        )
    if context[start : start + len(text)] != text:
        place = context.find(text)
        there = f"it is at {place:,}" if place >= 0 else "it is nowhere in it"
        raise RecordError(
            f"has the answer {text[:SHOWN]!r}, which the context does not hold at character "
            f"{start:,}; {there}"
        )
    return [text, start]


class QuestionEncoder:
    """Cut questions on contexts into rows of up to `row_tokens` tokens, by a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, row_tokens: int, stride: int) -> None:
        self._dtype, self._row_tokens, self._stride = tokenizer.dtype, row_tokens, stride
        self._whole, self._cut = (
            tokenizers.Tokenizer.from_str(tokenizer.to_json()) for _ in range(2)
        )
        self._whole.no_truncation()
        for each in (self._whole, self._cut):
            each.no_padding()
        room = row_tokens - self._whole.num_special_tokens_to_add(True)
        if stride >= room:
            raise UsageError(
                f"--stride {stride:,} leaves no step between rows of {row_tokens:,} tokens, of "
                f"which {max(room, 0):,} are for the question and its context; lower --stride, or "
                "raise --row-tokens"
            )
        self._cut.enable_truncation(row_tokens, stride=stride, strategy="only_second")

    def rows(
        self, texts: Sequence[str], answers: Sequence[Sequence[Any]], number: int
    ) -> list[tuple[Array, Array]]:
        """Return the ids and the target of each row of question `number`. Raises RecordError.

        The first answer is learnt; a row that lacks a part of it learns position 0.
        """
        question, context = texts
        room = self._row_tokens - len(self._whole.encode(question, ""))
        if room <= self._stride:
            raise RecordError(
                f"has a question that leaves room for {max(room, 0):,} tokens of the context in "
                f"rows of {self._row_tokens:,}, and spans overlap by {self._stride:,}; raise "
                "--row-tokens, or lower --stride"
            )
        whole = self._cut.encode(question, context)
        rows = []
        for each in (whole, *whole.overflowing):
            own = [place for place, part in enumerate(each.sequence_ids) if part == 1]
            spans = [each.offsets[place] for place in own]
            target = {
                "question": number,
                "first": own[0] if own else 0,
                "kinds": each.type_ids,
                "offsets": [character for span in spans for character in span],
                "span": _span_of(answers[0], own, spans) if answers and own else [0, 0],
                "context": context,
                "answers": [text for text, _ in answers],
            }
            blob = np.frombuffer(to_json(target).encode(), np.uint8)
            rows.append((np.array(each.ids, self._dtype), blob))
        return rows


def _span_of(
    answer: Sequence[Any], own: Sequence[int], spans: Sequence[tuple[int, int]]
) -> list[int]:
    """Return the first and the last position of an answer; [0, 0] where the row lacks a part."""
    first, last = answer[1], answer[1] + len(answer[0])
    inside = [
        place for place, span in zip(own, spans, strict=True) if span[0] < last and span[1] > first
    ]
    if not inside or spans[0][0] > first or spans[-1][1] < last:
        return [0, 0]
    return [inside[0], inside[-1]]
