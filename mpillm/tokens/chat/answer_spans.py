"""Find the assistant's words, and the end of its turns, in the text that a template writes.

Each answer is written again with a mark in its place: the text ahead of the mark and after it must
be that of the whole, so that the words in between are the answer's. The conversation up to an
answer, with the beginning of one, must be a prefix of the whole: a model is asked in this way.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mpillm.system.json_text import to_json
from mpillm.system.messages import printable
from mpillm.tokens.chat.chat_template import ChatTemplate, Message
from mpillm.tokens.text.records import RecordError

# Letters of no meaning that no template strips and no text has in a row.
MARK = "\ue000\uf8ff\ue000"
SHOWN = 40
# Ends the thoughts that a template may part from an answer.
THOUGHT = "</think>"


class AnswerSpan(NamedTuple):
    """The characters `start` to `stop` - 1: an answer and its end of turn. The text that a model is
    given before it ends at `prompt`; white space from there on is the answer's.
    """

    prompt: int
    start: int
    stop: int


@dataclass(frozen=True)
class Rendering:
    """The text of a conversation, and the answers in it."""

    text: str
    spans: tuple[AnswerSpan, ...]


class SpanFinder:
    """Find the answers that `template` writes; `special`: the tokenizer's special tokens."""

    def __init__(self, template: ChatTemplate, special: Iterable[str]) -> None:
        self._template = template
        ordered = sorted(filter(None, special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendering:
        """Write the messages, and find each answer. Raises RecordError where one is not found."""
        if not self._template.knows_calls:
            messages = [_as_words(each) for each in messages]
        text = self._template.render(messages, tools)
        spans: list[AnswerSpan] = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                span = self._span(text, messages, number, tools)
                if spans and span.prompt < spans[-1].stop:
                    raise self._refused(number, "writes two answers into each other")
                spans.append(span)
        return Rendering(text, tuple(spans))

    def _span(
        self, text: str, messages: Sequence[Message], number: int, tools: Sequence[Any] | None
    ) -> AnswerSpan:
        asked = self._template.render(messages[:number], tools, prompt=True) if number else ""
        if not text.startswith(asked):
            raise self._refused(
                number, f"does not begin by what a model is given before: {_end_of(asked)}"
            )
        words = messages[number]["content"]
        marked = list(messages)
        marked[number] = {**messages[number], "content": MARK}
        whole = self._template.render(marked, tools)
        found = _between(text, whole, words)
        if found is None or found[0] < len(asked):
            return self._written(text, messages, number, tools, asked)
        start, stop = found
        if not text[len(asked) : start].strip():
            # White space that a template writes ahead of the words is a model's to write.
            start = len(asked)
        last = number + 1 == len(messages)
        alone = whole if last else self._template.render(marked[: number + 1], tools)
        after = alone.partition(MARK)[2]
        return AnswerSpan(len(asked), start, stop + self._end_of_turn(text[stop:], after, number))

    def _written(
        self,
        text: str,
        messages: Sequence[Message],
        number: int,
        tools: Sequence[Any] | None,
        asked: str,
    ) -> AnswerSpan:
        """Take all that the template writes for a call of a tool, or for thoughts and an answer.

        It ends as it does where it is the last message, which may begin with empty thoughts.
        """
        message, start = messages[number], len(asked)
        alone = self._template.render(messages[: number + 1], tools).rstrip()
        ends = list(self._special.finditer(alone)) if self._special is not None else []
        end = ends[-1].group() if ends and ends[-1].end() == len(alone) else ""
        place = text.find(end, start) if end else -1
        stop = place + len(end) if end else len(alone)
        whole = alone.startswith(asked) and alone.endswith(text[start:stop])
        parted = message.get("tool_calls") or THOUGHT in message["content"]
        if not parted or not whole or place == start or stop <= start:
            raise self._refused(number, f"changes its words: {_begin_of(message['content'])}")
        return AnswerSpan(start, start, stop)

    def _end_of_turn(self, rest: str, after: str, number: int) -> int:
        """Return the length of the end of turn: what an answer alone is followed by, to its first
        special token or, without one, its last visible character.
        """
        special = self._special.search(after) if self._special is not None else None
        length = special.end() if special else len(after.rstrip()) or len(after)
        if not length:
            raise self._refused(number, "is followed by no end of turn: a model would not stop")
        if rest[:length] != after[:length]:
            raise self._refused(number, f"ends by {after[:length]!r} as the last turn alone")
        return length

    def _refused(self, number: int, what: str) -> RecordError:
        return RecordError(
            f"has an answer, message {number + 1}, whose tokens cannot be found: in "
            f"{self._template.place} it {what}; give another template by --chat-template FILE"
        )


def end_of_turn(template: ChatTemplate, special: Sequence[str]) -> str | None:
    """Return the special token that ends an answer; None where none does."""
    asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    try:
        found = SpanFinder(template, special).render([asked, answered])
    except RecordError:
        # It refuses such a conversation; those of the data decide.
        return None
    [span] = found.spans
    answer = found.text[span.start : span.stop]
    return next((text for text in special if text and answer.endswith(text)), None)


def _between(text: str, marked: str, words: str) -> tuple[int, int] | None:
    """Return where the words are, as they are or stripped, if only they replace the mark."""
    before, mark, after = marked.partition(MARK)
    if not mark or MARK in after or not text.startswith(before) or not text.endswith(after):
        return None
    inner = text[len(before) : len(text) - len(after)]
    known = (words, words.strip(), words.lstrip(), words.rstrip())
    return (len(before), len(before) + len(inner)) if inner in known and inner else None


def _as_words(message: Message) -> Message:
    """Write the calls of tools as words, for a template without a form of its own."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    written = [_line(call) for call in calls]
    words = [message["content"]] if message["content"] else []
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join([*words, *written])}


def _line(call: Mapping[str, Any]) -> str:
    """Write one call of a tool as JSON in a line."""
    return to_json(call.get("function", call))


def _begin_of(text: str) -> str:
    return repr(printable(text[:SHOWN] + ("…" if len(text) > SHOWN else "")))


def _end_of(text: str) -> str:
    return repr(printable(("…" if len(text) > SHOWN else "") + text[-SHOWN:]))
