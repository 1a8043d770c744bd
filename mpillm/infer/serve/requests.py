"""The requests that an engine computes, and the events by which it answers.

Neither torch, MPI nor HTTP: the API on rank 0 and the engine meet here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from mpillm.infer.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "failed"]


class TokenConstraint(Protocol):
    """The tokens that may come next, such as those of a JSON schema. Rank 0 alone has it."""

    def allowed(self) -> bytes | None:
        """Return a bit a token, the lowest bit first; None: every token."""

    def accept(self, token: int) -> None:
        """Take the token that was drawn."""


@dataclass(frozen=True)
class TextRequest:
    """One text to continue. `n` texts of one prompt are `n` requests: the engine shares pages."""

    prompt: tuple[int, ...]
    sampling: Sampling
    end_ids: frozenset[int] = frozenset()
    """A token that ends the text with the reason `stop`; it is not reported."""
    bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens to report at each place; None: no log-probabilities."""
    prompt_logprobs: bool = False
    """Whether to report them of the prompt, too."""
    constraint: TokenConstraint | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability by the softmax of the model's own logits, and the likeliest."""

    token: int
    logprob: float | None
    """None for the first token of a prompt."""
    top: tuple[tuple[int, float], ...] = ()
    """Tokens and log-probabilities, the likeliest first."""


@dataclass(frozen=True)
class PromptRead:
    """The prompt is computed. It comes once, ahead of the first token."""

    cached_tokens: int
    """Of the prompt, how many were found in the cache."""
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class TokenDrawn:
    """One more token of the text."""

    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Finished:
    """The last event of a request."""

    reason: FinishReason
    message: str = ""
    """Of a failure: the reason, for the client."""


TextEvent = PromptRead | TokenDrawn | Finished
Listener = Callable[[TextEvent], None]
"""Called by the engine's thread; it returns at once and raises nothing."""


class QueueFull(Exception):
    """The engine has as many requests waiting as it takes."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__("the queue is full")
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True)
class EngineCounts:
    """What an engine does now and has done so far."""

    running: int = 0
    waiting: int = 0
    pages: int = 0
    pages_used: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    preempted: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    """Requests by the reason of their end."""
    failure: str = ""
    """Why the engine ended, where it failed."""


class TextEngine(Protocol):
    """Computes many requests at once. Every method may be called from any thread of rank 0."""

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its text together."""

    def submit(self, request: TextRequest, listener: Listener) -> int:
        """Queue a request; return its number. Raises UsageError where it can't be computed, and
        QueueFull.
        """

    def cancel(self, number: int) -> None:
        """End a request; unknown or ended ones are ignored."""

    def embed(self, prompts: list[tuple[int, ...]]) -> list[list[float]]:
        """Return an embedding a prompt, of length 1. Raises UsageError where the model has none."""

    def counts(self) -> EngineCounts:
        """Return what it does now."""

    def drain(self) -> None:
        """Refuse new requests, and return when those that run and wait have finished."""

    def close(self) -> None:
        """End all requests, and the other ranks' loops."""
