"""POST /v1/completions: the answer as one object, or as events of a stream."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from mpillm.infer.serve.http.forms.completion_form import CompletionForm
from mpillm.infer.serve.http.forms.logprob_forms import completion_logprobs, token_text
from mpillm.infer.serve.http.request_record import RequestRecord
from mpillm.infer.serve.http.served_model import ServedModel
from mpillm.infer.serve.http.text_answers import TextAnswers, TextChoice, TextDelta
from mpillm.infer.serve.http.text_assembler import PlacedToken, TextAssembler


def usage_of(choices: Sequence[TextChoice], texts: int) -> dict[str, Any]:
    """Count the tokens of all choices; a prompt counts once for the `texts` that continue it."""
    firsts = choices[::texts]
    prompt = sum(choice.prompt_tokens for choice in firsts)
    written = sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in firsts)},
    }


class CompletionAnswers:
    """The texts of one request, in the form of completions."""

    def __init__(self, model: ServedModel, form: CompletionForm, record: RequestRecord) -> None:
        """Submit the texts. Raises ApiError where the engine refuses them."""
        self._model, self._form, self._record = model, form, record
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        choices = []
        for number in range(len(form.requests)):
            place = len(form.prompts[number // form.best_of]) if form.echo else 0
            assembler = TextAssembler(model.tokenizer.stream(), form.settings.stop, place)
            hidden = model.end_ids if form.lists_end else frozenset()
            choices.append(TextChoice(assembler, hidden, form.settings.max_tokens == 0))
        self._answers = TextAnswers(model.engine, form.requests, choices)

    def close(self) -> None:
        """Cancel what has not ended, and record what was counted."""
        self._answers.close()
        self._record.usage = self._usage()

    def _usage(self) -> dict[str, Any]:
        return usage_of(self._answers.choices, self._form.best_of)

    async def whole(self) -> dict[str, Any]:
        """Return the answer when all texts have ended."""
        parts: list[list[TextDelta]] = [[] for _ in self._form.requests]
        async for delta in self._answers.deltas():
            if delta is not None:
                self._record.note_delta(delta)
                parts[delta.choice].append(delta)
        kept = self._kept()
        choices = [self._choice(place, number, parts[number]) for place, number in enumerate(kept)]
        return {**self._head(), "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[dict[str, Any] | None]:
        """Yield the objects of a stream; None where nothing came for a while."""
        extra = {"usage": None} if self._form.settings.include_usage else {}
        async for delta in self._answers.deltas():
            if delta is None:
                yield None
                continue
            self._record.note_delta(delta)
            if delta.begins and not self._form.echo and not delta.finish:
                continue
            choice = self._choice(delta.choice, delta.choice, [delta])
            yield {**self._head(), "choices": [choice], **extra}
        if self._form.settings.include_usage:
            yield {**self._head(), "choices": [], "usage": self._usage()}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model.name,
        }

    def _kept(self) -> list[int]:
        """Return the numbers of the texts that are returned: of each prompt the likeliest ones."""
        form, choices = self._form, self._answers.choices

        def mean(number: int) -> float:
            return choices[number].total_logprob / max(1, choices[number].tokens)

        kept: list[int] = []
        for first in range(0, len(choices), form.best_of):
            numbers = range(first, first + form.best_of)
            likeliest = sorted(numbers, key=mean, reverse=True)
            kept += likeliest[: form.settings.n] if form.best_of > form.settings.n else numbers
        return kept

    def _choice(self, place: int, number: int, deltas: Sequence[TextDelta]) -> dict[str, Any]:
        form = self._form
        text = "".join(delta.text for delta in deltas)
        logprobs = [each for delta in deltas for each in delta.logprobs]
        finish = next((delta.finish for delta in deltas if delta.finish), None)
        if form.echo and any(delta.begins for delta in deltas):
            text = form.prompts[number // form.best_of] + text
            logprobs = self._of_prompt(number) + logprobs
        asked = form.logprobs is not None
        written = completion_logprobs(self._model.tokenizer, logprobs) if asked else None
        return {"index": place, "text": text, "logprobs": written, "finish_reason": finish}

    def _of_prompt(self, number: int) -> list[PlacedToken]:
        """Place the tokens of a prompt in its text."""
        found, place = [], 0
        for each in self._answers.choices[number].prompt:
            found.append(PlacedToken(place, each))
            # A part of a character begins where the character does.
            text = token_text(self._model.tokenizer, each.token)
            place += 0 if text.startswith("bytes:") else len(text)
        return found
