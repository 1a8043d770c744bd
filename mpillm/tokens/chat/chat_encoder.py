"""Conversations to token ids, and a mask of those that are learnt.

n tokens of a conversation: `ids` and `supervised` are (n,).
"""

from typing import Any, NamedTuple

import numpy as np

from mpillm.system.messages import printable
from mpillm.tokens.chat.answer_spans import AnswerSpan, Rendering, SpanFinder
from mpillm.tokens.chat.chat_formats import Conversation
from mpillm.tokens.chat.chat_template import ChatTemplate
from mpillm.tokens.chat.preference_formats import LEARNT_ANSWERS
from mpillm.tokens.text.records import RecordError
from mpillm.tokens.tokenizer import Ids, Tokenizer

Mask = np.ndarray[Any, np.dtype[np.uint8]]


class ChatTokens(NamedTuple):
    """The ids of a conversation, and 1 where one is learnt."""

    ids: Ids
    supervised: Mask


class ChatEncoder:
    """Encode conversations by a template; without one, texts alone."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._finder = SpanFinder(template, tokenizer.special_texts) if template else None

    def tokens(self, conversation: Conversation) -> ChatTokens:
        """Encode one conversation, all of it. Raises RecordError."""
        if "text" in conversation:
            end = np.array([self._tokenizer.eot_id], self._tokenizer.dtype)
            ids = np.concatenate((*self._tokenizer.encode_batch([conversation["text"]]), end))
            supervised = np.ones(len(ids), np.uint8)
        else:
            # Of preferences, the answers that both conversations share are a part of the prompt.
            last = conversation.get(LEARNT_ANSWERS, 0)
            ids, supervised = self._rendered(self.render(conversation), last)
        # Nothing predicts the first token of a row.
        supervised[0] = 0
        return ChatTokens(ids, supervised)

    def render(self, conversation: Conversation) -> Rendering:
        """Write a conversation by the template, with the places of its answers."""
        if self._finder is None:
            raise RecordError(
                "is a conversation, and the tokenizer has no chat template; give one by "
                "--chat-template FILE"
            )
        return self._finder.render(conversation["messages"], conversation.get("tools"))

    def _rendered(self, rendering: Rendering, last: int) -> tuple[Ids, Mask]:
        """Encode a text; its `last` answers are learnt, all of them for 0."""
        [(ids, offsets)] = self._tokenizer.encode_rendered([rendering.text])
        supervised = np.zeros(len(ids), np.uint8)
        begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        for span in rendering.spans[-last:]:
            inside = (begins < span.stop) & (ends > span.start) & (begins < ends)
            places = np.flatnonzero(inside).tolist()
            if not places:
                raise RecordError("has an answer that the tokenizer gives no token")
            for place in (places[0], places[-1]):
                _check_border(rendering.text, span, int(begins[place]), int(ends[place]))
            # A token that is half of the prompt is given, not learnt.
            supervised[inside & (begins >= span.prompt)] = 1
        return ids, supervised


def learnt_part(tokens: ChatTokens) -> ChatTokens:
    """Cut off what follows the last token that is learnt: no loss depends on it."""
    stop = int(np.flatnonzero(tokens.supervised)[-1]) + 1 if tokens.supervised.any() else 0
    return ChatTokens(tokens.ids[:stop], tokens.supervised[:stop])


def _check_border(text: str, span: AnswerSpan, begin: int, end: int) -> None:
    """Raise RecordError where a token holds more than white space beyond an answer."""
    outside = text[begin : span.start] + text[max(begin, span.stop) : end]
    if outside.strip():
        raise RecordError(
            f"has an answer whose border is within the token {printable(text[begin:end])!r}: the "
            "tokenizer joins it with what the template writes next to it; give another by "
            "--chat-template FILE"
        )
