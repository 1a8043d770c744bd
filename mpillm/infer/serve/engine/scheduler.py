"""Which tokens of which texts a step computes: continuous batching with chunked prefill.

Neither torch nor MPI. Sources: Yu et al. 2022, "Orca" (a batch changes from step to step); Agrawal
et al. 2024, "Sarathi-Serve" (prompts are read in chunks next to texts that decode).
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from mpillm.infer.serve.engine.page_pool import PageKey, PagePool, page_keys


class Wanted(IntEnum):
    """What a text needs of the positions of a step."""

    NOTHING = 0
    LAST_LOGITS = 1
    ALL_LOGITS = 2
    STATES = 3
    """The sum of the hidden states."""


@dataclass(frozen=True)
class SchedulerSettings:
    """The bounds of a step. Measured by benchmarks/serve.py."""

    step_tokens: int = 512
    """Of all texts in a step where none decodes."""
    chunk_tokens: int = 64
    """Of prompts in a step where other texts decode, whose next tokens wait for it."""
    most_rows: int = 64
    """The texts that run at once."""


@dataclass(eq=False)
class TextRow:
    """A text that waits or runs."""

    number: int
    tokens: list[int]
    """Of the prompt, and those drawn so far."""
    prompt_length: int
    most: int
    """The tokens to draw; 0: none."""
    reads: Wanted = Wanted.LAST_LOGITS
    """Of the prompt's positions; all but the last logits need each of them computed."""
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    """The first tokens, whose keys and values are in the pages."""
    cached: int = 0
    """Of the prompt, those that were found in pages of others."""
    keys: list[PageKey] = field(default_factory=list)

    @property
    def drawn(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def decodes(self) -> bool:
        """Whether its newest token alone is to compute."""
        return self.computed > 0 and len(self.tokens) - self.computed == 1

    @property
    def reads_prompt(self) -> bool:
        """Whether each position of the prompt must be computed for what is asked of it."""
        return self.reads in (Wanted.ALL_LOGITS, Wanted.STATES) and not self.drawn


@dataclass(frozen=True)
class RowPiece:
    """The positions `first` to `first` + `count` − 1 of a text, for a step."""

    row: TextRow
    first: int
    count: int

    @property
    def completes(self) -> bool:
        """Whether the text's newest token is among them."""
        return self.first + self.count == len(self.row.tokens)

    @property
    def wanted(self) -> Wanted:
        row = self.row
        if row.reads_prompt:
            return row.reads
        return Wanted.LAST_LOGITS if self.completes and row.most else Wanted.NOTHING


class Scheduler:
    """The texts that wait and run, in the order in which they came."""

    def __init__(self, pool: PagePool, settings: SchedulerSettings) -> None:
        self.pool, self.settings = pool, settings
        self.waiting: deque[TextRow] = deque()
        self.running: list[TextRow] = []
        """In the order in which they came."""
        self.preempted = 0

    def pages_for(self, tokens: int) -> int:
        """Return how many pages hold `tokens`."""
        return -(-tokens // self.pool.page_tokens)

    def add(self, row: TextRow) -> None:
        """Let a text wait for its first step."""
        row.keys = page_keys(row.tokens, self.pool.page_tokens)
        self.waiting.append(row)

    def remove(self, row: TextRow) -> None:
        """Take out a text that has ended, in whatever state; its pages are given back."""
        if row in self.running:
            self.running.remove(row)
        else:
            self.waiting.remove(row)
        self._give_back(row)

    def plan(self) -> list[RowPiece]:
        """Choose the pieces of the next step; none where no text is to compute.

        Texts that decode come first, the longest one ahead. The pages of all pieces are taken.
        """
        decoding = self._decoding()
        budget = self.settings.chunk_tokens if decoding else self.settings.step_tokens
        reading: list[RowPiece] = []
        for row in self._reading():
            count = min(len(row.tokens) - row.computed, budget)
            if not count:
                break
            reading.append(RowPiece(row, row.computed, count))
            budget -= count
        pieces = [*decoding, *reading]
        # The last position that a step has room for may be a single one of a prompt: it is computed
        # as those that decode.
        single = [piece for piece in pieces if piece.count == 1 and piece.first]
        single.sort(key=lambda piece: -piece.first)
        return single + [piece for piece in pieces if piece not in single]

    def done(self, pieces: list[RowPiece]) -> None:
        """Note that a step was computed, ahead of the tokens that are drawn from it."""
        size = self.pool.page_tokens
        for piece in pieces:
            row = piece.row
            row.computed = piece.first + piece.count
            full = row.computed // size
            if full > len(row.keys):
                row.keys = page_keys(row.tokens, size, row.keys)
            for page in range(piece.first // size, full):
                self.pool.name(row.pages[page], row.keys[page])

    def _decoding(self) -> list[RowPiece]:
        """Return a piece of each text that decodes; where pages run out, preempt the last ones."""
        found = []
        for row in list(self.running):
            if row not in self.running or not row.decodes:
                continue
            while row in self.running and not self._has_room(row):
                self._preempt(self.running[-1])
            if row in self.running:
                found.append(RowPiece(row, row.computed, 1))
        return found

    def _has_room(self, row: TextRow) -> bool:
        """Take the page of a text's newest token; False where none is available."""
        if row.computed < len(row.pages) * self.pool.page_tokens:
            return True
        page = self.pool.take(1)
        row.pages += page or []
        return page is not None

    def _preempt(self, row: TextRow) -> None:
        """Take a text's pages: it is computed again, from its first token, when there is room."""
        self.running.remove(row)
        self._give_back(row)
        row.computed = 0
        # It came ahead of all that wait, and after those that were preempted before it came.
        self.waiting.appendleft(row)
        self.preempted += 1

    def _give_back(self, row: TextRow) -> None:
        self.pool.release(row.pages)
        row.pages = []

    def _reading(self) -> Iterator[TextRow]:
        """Yield the texts whose prompts are read, admitting those that wait."""
        for row in self.running:
            if not row.decodes and row.computed < len(row.tokens):
                yield row
        # Those that wait for a prefix let others pass.
        for row in list(self.waiting):
            if len(self.running) >= self.settings.most_rows:
                return
            if self._is_being_read(row):
                continue
            if not self._admit(row):
                return
            yield row

    def _is_being_read(self, row: TextRow) -> bool:
        """Return whether another text reads the next page of this one's: then it is shared soon."""
        if row.reads_prompt:
            return False
        shared = self._shared_keys(row)
        known = self.pool.share(shared)
        self.pool.release(known)
        if len(known) == len(shared):
            return False
        missing, size = shared[len(known)], self.pool.page_tokens
        return any(
            missing in other.keys[other.computed // size :]
            for other in self.running
            if not other.decodes
        )

    def _shared_keys(self, row: TextRow) -> list[PageKey]:
        """Return the keys of pages that a text may share: its newest token is always computed."""
        if row.reads_prompt:
            return []
        return row.keys[: (len(row.tokens) - 1) // self.pool.page_tokens]

    def _admit(self, row: TextRow) -> bool:
        """Let a text run, with pages for all its tokens; False where too few are available."""
        shared = self.pool.share(self._shared_keys(row))
        taken = self.pool.take(self.pages_for(len(row.tokens)) - len(shared))
        if taken is None:
            self.pool.release(shared)
            return False
        row.pages, row.computed = [*shared, *taken], len(shared) * self.pool.page_tokens
        if not row.drawn:
            row.cached = row.computed
        self.waiting.remove(row)
        self.running.append(row)
        return True
