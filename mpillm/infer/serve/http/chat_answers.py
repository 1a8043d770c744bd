"""POST /v1/chat/completions: the answer as one object, or as events of a stream."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from mpillm.infer.serve.http.completion_answers import usage_of
from mpillm.infer.serve.http.forms.chat_form import ChatForm
from mpillm.infer.serve.http.forms.logprob_forms import chat_logprobs
from mpillm.infer.serve.http.request_record import RequestRecord
from mpillm.infer.serve.http.served_model import ServedModel
from mpillm.infer.serve.http.text_answers import TextAnswers, TextChoice, TextDelta
from mpillm.infer.serve.http.text_assembler import PlacedToken, TextAssembler


class ChatAnswers:
    """The answers of one request, in the form of chats."""

    def __init__(self, model: ServedModel, form: ChatForm, record: RequestRecord) -> None:
        """Submit the texts. Raises ApiError where the engine refuses them."""
        self._model, self._form, self._record = model, form, record
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        choices = [
            TextChoice(TextAssembler(model.tokenizer.stream(), form.settings.stop))
            for _ in form.requests
        ]
        self._answers = TextAnswers(model.engine, form.requests, choices)

    def close(self) -> None:
        """Cancel what has not ended, and record what was counted."""
        self._answers.close()
        self._record.usage = self._usage()

    def _usage(self) -> dict[str, Any]:
        return usage_of(self._answers.choices, len(self._answers.choices))

    async def whole(self) -> dict[str, Any]:
        """Return the answer when all texts have ended."""
        texts = [""] * len(self._form.requests)
        logprobs: list[list[PlacedToken]] = [[] for _ in texts]
        async for delta in self._answers.deltas():
            if delta is not None:
                self._record.note_delta(delta)
                texts[delta.choice] += delta.text
                logprobs[delta.choice] += delta.logprobs
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._logprobs(logprobs[number]),
                "finish_reason": self._answers.choices[number].finish,
            }
            for number, text in enumerate(texts)
        ]
        head = self._head("chat.completion")
        return {**head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[dict[str, Any] | None]:
        """Yield the objects of a stream; None where nothing came for a while."""
        head = self._head("chat.completion.chunk")
        extra = {"usage": None} if self._form.settings.include_usage else {}
        async for delta in self._answers.deltas():
            if delta is None:
                yield None
                continue
            self._record.note_delta(delta)
            for choice in self._chunks(delta):
                yield {**head, "choices": [choice], **extra}
        if self._form.settings.include_usage:
            yield {**head, "choices": [], "usage": self._usage()}

    def _chunks(self, delta: TextDelta) -> list[dict[str, Any]]:
        """Write the role first, then the text, and the reason of the end alone at last."""
        found = []
        if delta.begins:
            found.append(self._chunk(delta, {"role": "assistant", "content": ""}))
        elif delta.text or delta.logprobs:
            text = {"content": delta.text}
            found.append(self._chunk(delta, text, self._logprobs(list(delta.logprobs))))
        if delta.finish:
            found.append({**self._chunk(delta, {}), "finish_reason": delta.finish})
        return found

    def _chunk(self, delta: TextDelta, new: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
        return {
            "index": delta.choice,
            "delta": new,
            "logprobs": logprobs,
            "finish_reason": None,
        }

    def _logprobs(self, placed: list[PlacedToken]) -> dict[str, Any] | None:
        return chat_logprobs(self._model.tokenizer, placed) if self._form.logprobs else None

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": None,
        }
