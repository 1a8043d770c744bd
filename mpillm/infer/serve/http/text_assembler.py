"""Tokens to text as they come, up to a stop string; what may begin one is held back."""

from collections.abc import Sequence
from typing import NamedTuple

from mpillm.infer.serve.requests import TokenLogprob
from mpillm.tokens.tokenizer import StreamDecoder


class PlacedToken(NamedTuple):
    """A token's log-probability, and where its text begins."""

    place: int
    logprob: TokenLogprob


class TextPiece(NamedTuple):
    """Text that is certain, with the log-probabilities of its tokens."""

    text: str
    logprobs: tuple[PlacedToken, ...] = ()


class TextAssembler:
    """Push each token of one text; print what comes back; `finish` returns the rest."""

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str], place: int = 0) -> None:
        """`place`: where the text begins, such as after the prompt that is repeated before it."""
        self._decoder, self._stops, self._place = decoder, tuple(stops), place
        self._held = ""
        self._waiting: list[PlacedToken] = []
        self.stopped = False
        """Whether a stop string came: the text ends ahead of it."""

    def push(self, token: int, logprob: TokenLogprob | None = None) -> TextPiece:
        """Take the next token; return what no stop string can take back."""
        if logprob is not None:
            self._waiting.append(PlacedToken(self._place + len(self._held), logprob))
        self._held += self._decoder.push(token)
        return self._certain()

    def finish(self) -> TextPiece:
        """Return the rest of a text that no stop string ended."""
        if self.stopped:
            return TextPiece("")
        self._held += self._decoder.finish()
        found = self._certain()
        if self.stopped:
            return found
        rest = self._release(len(self._held))
        return TextPiece(found.text + rest.text, found.logprobs + rest.logprobs)

    def _certain(self) -> TextPiece:
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            found = self._release(min(places))
            self._held, self._waiting = "", []
            return found
        return self._release(len(self._held) - self._begun())

    def _begun(self) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        return max(
            (
                count
                for stop in self._stops
                for count in range(min(len(stop) - 1, len(self._held)), 0, -1)
                if self._held.endswith(stop[:count])
            ),
            default=0,
        )

    def _release(self, count: int) -> TextPiece:
        text, self._held = self._held[:count], self._held[count:]
        self._place += count
        # A token whose text begins beyond waits for it; one without a text of its own does not.
        ready = [each for each in self._waiting if each.place < self._place or not self._held]
        self._waiting = self._waiting[len(ready) :]
        return TextPiece(text, tuple(ready))
