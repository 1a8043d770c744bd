"""An engine that computes many texts at once, in a thread of its own on rank 0.

Each step it takes in what has come, plans the positions of all texts, computes them in one pass,
and draws a token of each text that is read to its end.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from mpillm.errors import UsageError
from mpillm.infer.sampling import Sampling
from mpillm.infer.serve.engine.draw_token import TokenDraw, draw_all, token_logprobs
from mpillm.infer.serve.engine.page_pool import PagePool
from mpillm.infer.serve.engine.row_plan import PlannedRow, RowPlan
from mpillm.infer.serve.engine.scheduler import (
    RowPiece,
    Scheduler,
    SchedulerSettings,
    TextRow,
    Wanted,
)
from mpillm.infer.serve.requests import (
    EngineCounts,
    Finished,
    FinishReason,
    Listener,
    PromptRead,
    QueueFull,
    TextEvent,
    TextRequest,
    TokenDrawn,
    TokenLogprob,
)

# Until the first text has ended, and the most that a client is asked to wait.
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 2.0, 60.0
NOT_FINITE = "the model's outputs are not finite: the run diverged"


class Runner(Protocol):
    """Computes a step on all ranks."""

    def run(self, rows: Sequence[PlannedRow]) -> list[Tensor | None]:
        """See StepRunner."""

    def end(self) -> None:
        """Let the other ranks end."""


@dataclass(eq=False)
class _Text:
    """A request, its row, and what was found so far."""

    request: TextRequest
    listener: Listener
    row: TextRow
    draw: TokenDraw
    begun: float
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt."""
    states_C: Tensor | None = None
    """The sum of the prompt's hidden states so far."""
    was_read: bool = False

    @property
    def open_logits(self) -> bool:
        """Whether each position's logits are asked for."""
        return self.row.reads == Wanted.ALL_LOGITS


class BatchEngine:
    """Continuous batching over pages of keys and values. Every method may be called by any thread.

    `runner` computes a step; `most_waiting`: texts that wait at once.
    """

    def __init__(
        self,
        runner: Runner,
        pool: PagePool,
        context: int,
        vocabulary: int,
        most_waiting: int = 256,
        settings: SchedulerSettings | None = None,
    ) -> None:
        self._runner, self._pool = runner, pool
        self._context, self._vocabulary = context, vocabulary
        self._most_waiting = most_waiting
        self._scheduler = Scheduler(pool, settings or SchedulerSettings())
        self._lock = threading.Condition()
        self._arrived: deque[_Text] = deque()
        self._cancelled: set[int] = set()
        self._texts: dict[int, _Text] = {}
        """All that have not ended, by their numbers."""
        self._number, self._draining, self._closing, self._failure = 0, False, False, ""
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._mean_seconds = FIRST_RETRY_SECONDS
        self._thread = threading.Thread(target=self._work, name="mpillm-engine", daemon=True)
        self._thread.start()

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its text together."""
        return self._context

    def submit(self, request: TextRequest, listener: Listener) -> int:
        """Queue a text; return its number. Raises UsageError and QueueFull."""
        asks_all = request.prompt_logprobs and request.top_logprobs is not None
        reads = Wanted.ALL_LOGITS if asks_all else Wanted.LAST_LOGITS
        return self._submit(request, listener, reads, request.sampling.max_tokens)

    def cancel(self, number: int) -> None:
        """End a text; unknown or ended ones are ignored."""
        with self._lock:
            if number in self._texts:
                self._cancelled.add(number)
                self._lock.notify_all()

    def embed(self, prompts: list[tuple[int, ...]]) -> list[list[float]]:
        """Return the mean of each prompt's last hidden states, of length 1. Raises UsageError."""
        return [self._embedding(prompt) for prompt in prompts]

    def counts(self) -> EngineCounts:
        """Return what it does now."""
        with self._lock:
            running = len(self._scheduler.running)
            return EngineCounts(
                running=running,
                waiting=max(0, len(self._texts) - running),
                pages=self._pool.pages,
                pages_used=self._pool.used,
                prompt_tokens=self._counts["prompt"],
                cached_tokens=self._counts["cached"],
                generated_tokens=self._counts["generated"],
                steps=self._counts["steps"],
                preempted=self._scheduler.preempted,
                finished=dict(self._finished),
                failure=self._failure,
            )

    def drain(self) -> None:
        """Refuse new texts, and return when those that run and wait have finished."""
        with self._lock:
            self._draining = True
            self._lock.wait_for(lambda: not self._texts)

    def close(self) -> None:
        """End all texts, the thread, and the other ranks' loops."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._thread.join()

    def _submit(self, request: TextRequest, listener: Listener, reads: Wanted, most: int) -> int:
        self._check(request, most)
        with self._lock:
            waiting = len(self._texts) - len(self._scheduler.running)
            if self._draining or self._closing or self._failure or waiting >= self._most_waiting:
                raise QueueFull(self._retry_seconds(waiting))
            self._number += 1
            row = TextRow(self._number, [*request.prompt], len(request.prompt), most, reads)
            text = _Text(request, listener, row, TokenDraw(request), time.monotonic())
            self._texts[row.number] = text
            self._arrived.append(text)
            self._lock.notify_all()
            return row.number

    def _check(self, request: TextRequest, most: int) -> None:
        count = len(request.prompt) + most
        room = self._pool.pages * self._pool.page_tokens
        if not request.prompt:
            raise UsageError("the prompt is empty; begin with a token, such as the end of text")
        if count > self._context:
            raise UsageError(
                f"the context is {self._context:,} tokens, and prompt and text have {count:,}; "
                "shorten one of them"
            )
        if count > room:
            raise UsageError(
                f"the cache has room for {room:,} tokens, and prompt and text have {count:,}; "
                "shorten one of them"
            )
        # Checked here, since a fault within a step ends the texts of all clients.
        tokens = *request.prompt, *request.bias
        odd = [token for token in tokens if not 0 <= token < self._vocabulary]
        if odd:
            raise UsageError(f"the token {odd[0]} is not in the vocabulary of {self._vocabulary:,}")
        if (request.top_logprobs or 0) > self._vocabulary:
            raise UsageError(
                f"the vocabulary has {self._vocabulary:,} tokens, and the log-probabilities of "
                f"{request.top_logprobs:,} are asked for; ask for fewer"
            )

    def _retry_seconds(self, waiting: int) -> float:
        """Return about how long a text waits: others run side by side, some of them ahead."""
        side_by_side = max(1, len(self._scheduler.running))
        return min(LONGEST_RETRY_SECONDS, max(1.0, self._mean_seconds * waiting / side_by_side))

    def _embedding(self, prompt: tuple[int, ...]) -> list[float]:
        ended, ends = threading.Event(), deque[TextEvent](maxlen=1)

        def hear(event: TextEvent) -> None:
            ends.append(event)
            if isinstance(event, Finished):
                ended.set()

        with self._lock:
            number = self._submit(TextRequest(prompt, Sampling(1)), hear, Wanted.STATES, 0)
            text = self._texts[number]
        ended.wait()
        [end] = ends
        assert isinstance(end, Finished)
        # One that ended early has the sum of some of its states.
        if end.reason != "length" or text.states_C is None:
            raise UsageError(f"the text was not embedded: {end.message or end.reason}")
        if not text.states_C.isfinite().all():
            raise UsageError(f"the text was not embedded: {NOT_FINITE}")
        found: list[float] = F.normalize(text.states_C, dim=0).tolist()
        return found

    def _work(self) -> None:
        try:
            while self._take_in():
                self._step()
        except BaseException as failure:
            self._failure = f"{type(failure).__name__}: {failure}"
        self._end_all()
        # After a failure other ranks may wait within a step and never hear of an end: `close` would
        # wait for them. The caller raises, and that ends all ranks.
        if not self._failure:
            self._runner.end()

    def _take_in(self) -> bool:
        """Wait until there is work; return False where the engine closes."""
        with self._lock:
            # Asleep while nothing is asked: an idle server takes no processor time.
            self._lock.wait_for(lambda: self._closing or self._texts)
            if self._closing:
                return False
            while self._arrived:
                self._scheduler.add(self._arrived.popleft().row)
            cancelled, self._cancelled = self._cancelled, set()
        for number in cancelled:
            if number in self._texts:
                self._end(self._texts[number], "cancelled")
        return True

    def _step(self) -> None:
        pieces = self._scheduler.plan()
        if not pieces:
            return
        plan = RowPlan.of(pieces, self._pool.page_tokens)
        found = self._runner.run(plan.rows)
        self._scheduler.done(pieces)
        self._counts["steps"] += 1
        drawing: list[tuple[_Text, Tensor]] = []
        for piece, wanted in zip(pieces, found, strict=True):
            text = self._texts[piece.row.number]
            self._note(text, piece, wanted)
            if not piece.completes:
                continue
            self._say_read(text)
            if not text.row.most:
                self._end(text, "length")
            elif wanted is None or not wanted[-1].isfinite().all():
                self._end(text, "failed", NOT_FINITE)
            else:
                drawing.append((text, wanted[-1]))
        self._draw(drawing)

    def _draw(self, drawing: Sequence[tuple[_Text, Tensor]]) -> None:
        tokens = draw_all([text.draw for text, _ in drawing], [logits for _, logits in drawing])
        for (text, logits_V), token in zip(drawing, tokens, strict=True):
            request = text.request
            if isinstance(token, Exception):
                # Of this text alone: a constraint is made of what its client sent.
                self._end(text, "failed", f"the constraint failed: {token}")
                continue
            if token in request.end_ids:
                self._end(text, "stop")
                continue
            log = None
            if request.top_logprobs is not None:
                [log] = token_logprobs(logits_V[None], [token], request.top_logprobs)
            text.row.tokens.append(token)
            self._counts["generated"] += 1
            text.listener(TokenDrawn(token, log))
            if text.row.drawn == text.row.most:
                self._end(text, "length")
            elif request.constraint is not None:
                self._accept(text, token)

    def _accept(self, text: _Text, token: int) -> None:
        assert text.request.constraint is not None
        try:
            text.request.constraint.accept(token)
        except Exception as failure:
            # Of this text alone: a constraint is made of what its client sent.
            self._end(text, "failed", f"the constraint failed: {failure}")

    def _note(self, text: _Text, piece: RowPiece, wanted: Tensor | None) -> None:
        """Keep what was computed of the positions of a prompt."""
        if wanted is None or text.was_read:
            return
        if not piece.first:
            # A text that was preempted while its prompt was read is read again.
            text.states_C, text.logprobs = None, []
        if text.row.reads == Wanted.STATES:
            text.states_C = wanted if text.states_C is None else text.states_C + wanted
        elif text.open_logits and text.request.top_logprobs is not None:
            prompt = text.request.prompt
            following = prompt[piece.first + 1 : piece.first + piece.count + 1]
            if following:
                given = wanted[: len(following)], following, text.request.top_logprobs
                text.logprobs += token_logprobs(*given)

    def _say_read(self, text: _Text) -> None:
        if text.was_read:
            return
        text.was_read = True
        self._counts["prompt"] += text.row.prompt_length
        self._counts["cached"] += text.row.cached
        logprobs: tuple[TokenLogprob, ...] = ()
        if text.open_logits:
            logprobs = (TokenLogprob(text.request.prompt[0], None), *text.logprobs)
        text.listener(PromptRead(text.row.cached, logprobs))

    def _end(self, text: _Text, reason: FinishReason, message: str = "") -> None:
        self._scheduler.remove(text.row)
        with self._lock:
            del self._texts[text.row.number]
            self._finished[reason] += 1
            if reason in ("stop", "length"):
                seconds = time.monotonic() - text.begun
                self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
            self._lock.notify_all()
        text.listener(Finished(reason, message))

    def _end_all(self) -> None:
        with self._lock:
            texts, self._texts = list(self._texts.values()), {}
            reason: FinishReason = "failed" if self._failure else "cancelled"
            self._finished[reason] += len(texts)
            self._lock.notify_all()
        for text in texts:
            text.listener(Finished(reason, self._failure))
