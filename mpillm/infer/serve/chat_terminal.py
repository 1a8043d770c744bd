"""Talk to a model in a terminal: the work of `mpillm chat`."""

import queue
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.errors import CheckpointError, UsageError
from mpillm.infer.chat_prompt import answer_ends
from mpillm.infer.sampling import Sampling
from mpillm.infer.serve.open_engine import EngineOptions, open_engine
from mpillm.infer.serve.requests import (
    Finished,
    TextEngine,
    TextEvent,
    TextRequest,
    TokenDrawn,
)
from mpillm.system.console import Console
from mpillm.tokens.chat.chat_template import ChatTemplate
from mpillm.tokens.text.records import RecordError
from mpillm.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mpi4py import MPI

HELP = "/reset forgets the conversation, /quit leaves; Ctrl-C stops an answer"
# So much of the context is kept for an answer, where the turns would fill it.
ANSWER_SHARE = 4
Turn = dict[str, str]


@dataclass
class ChatSession:
    """A conversation with a model: the turns so far, and how answers are drawn."""

    engine: TextEngine
    tokenizer: Tokenizer
    template: ChatTemplate
    sampling: Sampling
    system: str = ""

    def __post_init__(self) -> None:
        self._turns: list[Turn] = []
        self._ends = answer_ends(self.tokenizer, self.template)

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self._turns.clear()

    def ask(self, text: str, note: Callable[[str], None]) -> Iterator[str]:
        """Yield the pieces of the answer to `text`, and keep both turns.

        Closed early, the answer ends and what was written of it is kept. `note` is called where
        the oldest turns no longer fit. Raises UsageError for a turn that is too long.
        """
        self._turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for piece in self._answer(self._prompt(note)):
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self._turns.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self._turns.pop()

    def _prompt(self, note: Callable[[str], None]) -> list[int]:
        """Write the turns as ids, without the oldest ones where they are too many."""
        context = self.engine.context
        most = context - max(1, min(self.sampling.max_tokens, context // ANSWER_SHARE))
        dropped = 0
        while len(ids := self._ids()) > most:
            if len(self._turns) < 3:
                raise UsageError(
                    f"the turn has {len(ids):,} tokens with the template's, and the context has "
                    f"room for {most:,}; shorten it"
                )
            # A question with its answer: a template may ask for turns in alternation.
            del self._turns[:2]
            dropped += 2
        if dropped:
            note(f"the conversation fills the context: its {dropped} oldest turns are left out")
        return ids

    def _ids(self) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            written = self.template.render([*system, *self._turns], prompt=True)
        except RecordError as failure:
            raise UsageError(f"the conversation {failure}") from failure
        [(ids, _)] = self.tokenizer.encode_rendered([written])
        return list(map(int, ids))

    def _answer(self, ids: list[int]) -> Iterator[str]:
        events: queue.Queue[TextEvent] = queue.Queue()
        room = self.engine.context - len(ids)
        sampling = replace(self.sampling, max_tokens=min(self.sampling.max_tokens, room))
        request = TextRequest(tuple(ids), sampling, self._ends)
        number = self.engine.submit(request, events.put)
        decoder = self.tokenizer.stream()
        try:
            while not isinstance(event := events.get(), Finished):
                if isinstance(event, TokenDrawn) and (piece := decoder.push(event.token)):
                    yield piece
            if event.reason in ("failed", "cancelled"):
                raise CheckpointError(event.message or "the engine ended")
            if rest := decoder.finish():
                yield rest
        finally:
            self.engine.cancel(number)


def chat_in_terminal(
    trained: Path,
    system: str,
    sampling: Sampling,
    engine: EngineOptions,
    comm: "MPI.Intracomm",
    console: Console,
) -> None:
    """Read turns from the standard input, and write answers. Every rank calls it; rank 0 talks.

    Raises UsageError where the model has no chat template.
    """
    started = open_engine(trained, engine, comm, console)
    if comm.rank:
        started.follow()
        return
    try:
        if started.template is None:
            raise UsageError(
                f"{trained} has no chat template; `mpillm generate` continues a text, or train on "
                "data of the task chat"
            )
        session = ChatSession(started.own, started.tokenizer, started.template, sampling, system)
        talk(session, console, read_turns(console))
    finally:
        started.own.close()


def talk(session: ChatSession, console: Console, turns: Iterator[str]) -> None:
    """Answer each turn, until there are no more or one asks to leave."""
    for text in turns:
        if text == "/quit":
            return
        if text == "/reset":
            session.reset()
            console.say("the conversation is forgotten")
        elif text == "/help":
            console.say(HELP)
        elif text.startswith("/") and " " not in text:
            console.say(f"{text} is no command: {HELP}")
        else:
            _write_answer(session, console, text)


def _write_answer(session: ChatSession, console: Console, text: str) -> None:
    pieces = session.ask(text, console.say)
    try:
        for piece in pieces:
            console.write(piece)
    except UsageError as failure:
        console.warn(str(failure))
    except KeyboardInterrupt as interrupt:
        # Ctrl-C is without words; a signal that ends the process names itself.
        if str(interrupt) or not console.is_terminal:
            raise
    finally:
        close: Any = pieces
        close.close()
    console.write("\n")


def read_turns(console: Console) -> Iterator[str]:
    """Yield the lines of the standard input: typed at a prompt in a terminal, else as they are."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
        return
    # Loaded for its effect: arrow keys edit the line, and find earlier ones.
    import readline  # noqa: F401

    console.say(HELP)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            console.write("\n")
            return
        if line:
            yield line
