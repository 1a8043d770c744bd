"""The texts of one HTTP request as the engine writes them, in asyncio."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from mpillm.errors import UsageError
from mpillm.infer.serve.http.forms.api_error import ApiError, retry_later
from mpillm.infer.serve.http.text_assembler import PlacedToken, TextAssembler
from mpillm.infer.serve.requests import (
    Finished,
    PromptRead,
    QueueFull,
    TextEngine,
    TextEvent,
    TextRequest,
    TokenDrawn,
    TokenLogprob,
)

# A proxy or a tunnel drops what is silent for a minute or so.
QUIET_SECONDS = 15.0


@dataclass
class TextChoice:
    """One text: how it is put together, and what has come of it."""

    assembler: TextAssembler
    hidden_ends: frozenset[int] = frozenset()
    """End tokens that the engine does not know of, since their log-probabilities are asked for."""
    drops_text: bool = False
    """Whether the prompt alone was asked for: a token is drawn all the same."""
    prompt: tuple[TokenLogprob, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    total_logprob: float = 0.0
    finish: str = ""
    """`stop` or `length`, once it has ended."""


@dataclass(frozen=True)
class TextDelta:
    """What is new of the text number `choice`; `finish`: the reason of its end, on the last."""

    choice: int
    text: str = ""
    logprobs: tuple[PlacedToken, ...] = ()
    finish: str = ""
    begins: bool = False
    """Whether its prompt was read."""


class TextAnswers:
    """Submit requests to the engine, and yield what it writes. Closed, it cancels the rest."""

    def __init__(
        self, engine: TextEngine, requests: Sequence[TextRequest], choices: Sequence[TextChoice]
    ) -> None:
        """Submit all of them, or none. Raises ApiError where the engine refuses one."""
        self.choices = list(choices)
        self._engine = engine
        self._events: asyncio.Queue[tuple[int, TextEvent]] = asyncio.Queue()
        self._numbers: dict[int, int] = {}
        loop = asyncio.get_running_loop()
        try:
            for choice, request in enumerate(requests):
                self.choices[choice].prompt_tokens = len(request.prompt)
                listener = partial(self._listen, loop, choice)
                self._numbers[choice] = engine.submit(request, listener)
        except QueueFull as failure:
            self.close()
            raise retry_later(
                429,
                "the server has as many requests waiting as it takes; repeat this one later",
                failure.retry_after_seconds,
                "queue_full",
            ) from failure
        except UsageError as failure:
            self.close()
            raise ApiError(400, str(failure)) from failure

    def _listen(self, loop: asyncio.AbstractEventLoop, choice: int, event: TextEvent) -> None:
        """Take an event, on the engine's thread."""
        # The loop is closed where the server ends at once: nothing waits for the event.
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))

    def close(self) -> None:
        """Cancel what has not ended."""
        for number in self._numbers.values():
            self._engine.cancel(number)
        self._numbers.clear()

    async def deltas(self) -> AsyncIterator[TextDelta | None]:
        """Yield what is new, until all texts have ended; None where nothing came for a while.

        Raises ApiError where the engine fails. The caller closes the answers.
        """
        while self._numbers:
            try:
                choice, event = await asyncio.wait_for(self._events.get(), QUIET_SECONDS)
            except TimeoutError:
                yield None
                continue
            # Of a text that a stop string has ended, more may have been on its way.
            if choice in self._numbers and (delta := self._take(choice, event)) is not None:
                yield delta

    def _take(self, number: int, event: TextEvent) -> TextDelta | None:
        choice = self.choices[number]
        if isinstance(event, PromptRead):
            choice.prompt, choice.cached_tokens = event.logprobs, event.cached_tokens
            if choice.drops_text:
                return self._end(number, TextDelta(number, finish="length", begins=True))
            return TextDelta(number, begins=True)
        if isinstance(event, Finished):
            return self._finished(number, event)
        return self._drawn(number, event)

    def _drawn(self, number: int, event: TokenDrawn) -> TextDelta | None:
        choice = self.choices[number]
        ends = event.token in choice.hidden_ends
        piece = choice.assembler.push(event.token, event.logprob)
        choice.total_logprob += (event.logprob and event.logprob.logprob) or 0.0
        choice.tokens += not ends
        if choice.assembler.stopped or ends:
            rest = choice.assembler.finish()
            text, logprobs = piece.text + rest.text, piece.logprobs + rest.logprobs
            return self._end(number, TextDelta(number, text, logprobs, "stop"))
        if not piece.text and not piece.logprobs:
            return None
        return TextDelta(number, piece.text, piece.logprobs)

    def _finished(self, number: int, event: Finished) -> TextDelta:
        if event.reason in ("failed", "cancelled"):
            del self._numbers[number]
            reason = event.message or "the server ends, and the text with it"
            raise ApiError(503, reason, code="engine_failed" if event.message else "ending")
        piece = self.choices[number].assembler.finish()
        stopped = self.choices[number].assembler.stopped
        finish = "stop" if stopped else event.reason
        del self._numbers[number]
        self.choices[number].finish = finish
        return TextDelta(number, piece.text, piece.logprobs, finish)

    def _end(self, number: int, delta: TextDelta) -> TextDelta:
        """End a text ahead of the engine."""
        self._engine.cancel(self._numbers.pop(number))
        self.choices[number].finish = delta.finish
        return delta
