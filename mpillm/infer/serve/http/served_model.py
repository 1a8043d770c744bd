"""The model that is served, as the HTTP side knows it: its names, tokens and template."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mpillm.errors import DataError
from mpillm.infer.serve.http.forms.api_error import ApiError, wrong_field
from mpillm.infer.serve.http.forms.json_constraint import SchemaCompiler
from mpillm.infer.serve.requests import TextEngine
from mpillm.tokens.chat.chat_template import ChatTemplate
from mpillm.tokens.text.records import RecordError
from mpillm.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """One model under one or more names; the first is the one that answers carry."""

    names: tuple[str, ...]
    engine: TextEngine
    tokenizer: Tokenizer
    template: ChatTemplate | None
    end_ids: frozenset[int]
    """What ends a text: the end of text, of a target or of a turn."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its text together."""
        return self.engine.context

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @cached_property
    def schemas(self) -> SchemaCompiler:
        """The compiler of JSON schemas; it is made when the first one comes."""
        return SchemaCompiler(self.tokenizer, self.end_ids)

    def check_name(self, value: Any) -> None:
        """Raise ApiError unless `value` names this model; left out, it does."""
        if value is None:
            return
        if not isinstance(value, str):
            raise wrong_field("model", "takes a text", "invalid_type")
        if value not in self.names:
            raise ApiError(
                404,
                f"the model {value[:100]!r} is not served here; ask for {self.name!r}",
                "model",
                "model_not_found",
            )

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode a prompt as `mpillm generate` does; an empty one begins a new document.

        A special token that the text spells is obeyed, as clients that write templates expect.
        Raises ApiError where the tokenizer lacks a character.
        """
        return tuple(self.tokens_of(text) or [self.tokenizer.eot_id])

    def tokens_of(self, text: str, rows: bool = False) -> list[int]:
        """Encode a text; `rows`: with the tokens of the post-processor, such as [CLS]."""
        try:
            if rows and self.tokenizer.marks_rows:
                found = self.tokenizer.encode_rows([text])[0][0]
            elif any(special in text for special in self._special_texts):
                found = self.tokenizer.encode_rendered([text])[0][0]
            else:
                return self.tokenizer.encode(text)
        except DataError as failure:
            raise ApiError(400, str(failure), "prompt") from failure
        return list(map(int, found))

    @cached_property
    def _special_texts(self) -> list[str]:
        return [text for text in self.tokenizer.special_texts if text]

    def text_of(self, ids: Sequence[int]) -> str:
        """Decode ids, with the names of special tokens."""
        return self.tokenizer.decode_rendered(np.array(ids, np.int64))

    def chat_prompt(self, messages: Sequence[dict[str, Any]], answer: bool = True) -> list[int]:
        """Write messages by the template, with the beginning of an `answer`, as ids.

        Raises ApiError without a template, and where it refuses the messages.
        """
        if self.template is None:
            raise ApiError(
                400,
                f"the model {self.name} has no chat template; ask /v1/completions, or serve a "
                "model that was trained on conversations",
                "messages",
                "no_chat_template",
            )
        try:
            written = self.template.render(messages, prompt=answer)
        except RecordError as failure:
            # Its remedy is that of `prepare`.
            reason = str(failure).partition("; leave the record out")[0]
            raise ApiError(400, f"the conversation {reason}", "messages") from failure
        try:
            [(ids, _)] = self.tokenizer.encode_rendered([written])
        except DataError as failure:
            raise ApiError(400, str(failure), "messages") from failure
        return list(map(int, ids))
