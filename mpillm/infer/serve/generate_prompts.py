"""Continue the prompts of a file on all ranks: the work of `mpillm generate --prompts`."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import CheckpointError, UsageError
from mpillm.infer.chat_prompt import answer_ends
from mpillm.infer.sampling import Sampling
from mpillm.infer.serve.load_served import load_served
from mpillm.infer.serve.open_engine import EngineOptions, start_alone
from mpillm.infer.serve.requests import (
    Finished,
    QueueFull,
    TextEngine,
    TextEvent,
    TextRequest,
    TokenDrawn,
)
from mpillm.machine.node_map import map_nodes
from mpillm.parallel.devices import choose_device
from mpillm.system.console import Console
from mpillm.system.json_text import from_json, to_json
from mpillm.system.messages import explain
from mpillm.tokens.chat.chat_template import ChatTemplate
from mpillm.tokens.text.records import RecordError
from mpillm.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mpi4py import MPI

# Prompts of a rank between two gatherings: enough that its batches stay full.
ROUND = 64
FORMS = 'a line is a prompt, or in a .jsonl file {"prompt": "…"} or {"messages": […]}'


@dataclass
class _TextInProgress:
    """The tokens of one text as they come."""

    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    message: str = ""
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: TextEvent) -> None:
        if isinstance(event, TokenDrawn):
            self.tokens.append(event.token)
        elif isinstance(event, Finished):
            self.finish, self.message = event.reason, event.message
            self.ended.set()


@dataclass(frozen=True)
class PromptLine:
    """A prompt of the file: its tokens, and what the result says of it."""

    ids: tuple[int, ...]
    given: Any


def print_texts(
    trained: Path,
    prompts: Path,
    sampling: Sampling,
    comm: "MPI.Intracomm",
    console: Console,
    device: str = "auto",
) -> None:
    """Print a line of JSON a prompt, in the order of the file. Every rank calls it.

    Ranks share out the prompts, and each computes many at once. Prompt number i, from 0, has the
    seed plus i, so the texts are the same at any number of ranks. Raises UsageError for a line that
    is no prompt, and CheckpointError where the model's outputs are not finite.
    """
    place, _ = choose_device(device, comm, map_nodes(comm), share=True, option="--device")
    served = load_served(trained, comm, console)
    if served.spec.source_field:
        raise UsageError(f"{trained} reads a source; --prompts is for decoders, take --prompt")
    lines = on_root(comm, lambda: list(read_prompts(prompts, served.tokenizer, served.template)))
    lines = comm.bcast(lines)
    _check_lengths(lines, served.spec.context, prompts)
    engine = start_alone(served.whole().to(place), EngineOptions(queue=2 * ROUND))
    ends = answer_ends(served.tokenizer, served.template)
    try:
        for first in range(0, len(lines), ROUND * comm.size):
            numbers = range(first, min(first + ROUND * comm.size, len(lines)))
            own = numbers[comm.rank :: comm.size]
            found = on_all(comm, partial(_write, engine, lines, own, sampling, ends))
            every = comm.gather(found)
            if every is not None:
                texts = {number: made for rank in every for number, made in rank.items()}
                for number in numbers:
                    line = _result(number, lines[number], texts[number], served.tokenizer)
                    console.write(f"{to_json(line)}\n")
    finally:
        engine.close()


def read_prompts(
    path: Path, tokenizer: Tokenizer, template: ChatTemplate | None
) -> Iterator[PromptLine]:
    """Yield the prompts of a file; empty lines are passed over. Raises UsageError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as failure:
        raise UsageError(f"cannot read --prompts {explain(failure, path)}") from failure
    except UnicodeDecodeError as failure:
        raise UsageError(
            f"--prompts {path} is no UTF-8; convert it, such as with iconv"
        ) from failure
    # Not by splitlines: a text may hold other ends of lines, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield _prompt(line, path.suffix == ".jsonl", tokenizer, template)
        except (ValueError, RecordError) as failure:
            raise UsageError(f"--prompts {path}, line {number}: {failure}; {FORMS}") from None


def _prompt(
    line: str, is_json: bool, tokenizer: Tokenizer, template: ChatTemplate | None
) -> PromptLine:
    if not is_json:
        line = line.removesuffix("\r")
        return PromptLine(tuple(tokenizer.encode(line)), line)
    record = from_json(line)
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        prompt = record["prompt"]
        return PromptLine(tuple(tokenizer.encode(prompt)) or (tokenizer.eot_id,), prompt)
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ValueError("it has neither a text `prompt` nor a list `messages`")
    for message in record["messages"]:
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise ValueError("a message has the texts `role` and `content`")
    if template is None:
        raise ValueError("it has `messages`, and the model has no chat template")
    written = template.render(record["messages"], prompt=True)
    [(ids, _)] = tokenizer.encode_rendered([written])
    return PromptLine(tuple(ids.tolist()), record["messages"])


def _check_lengths(lines: Sequence[PromptLine], context: int, path: Path) -> None:
    for number, line in enumerate(lines, 1):
        if len(line.ids) >= context:
            raise UsageError(
                f"prompt {number} of {path} has {len(line.ids):,} tokens, and the context is "
                f"{context:,}; shorten it"
            )


def _write(
    engine: TextEngine,
    lines: Sequence[PromptLine],
    numbers: Sequence[int],
    sampling: Sampling,
    ends: frozenset[int],
) -> dict[int, tuple[list[int], str]]:
    """Write the texts of the prompts `numbers`; return tokens and reason of the end by number."""
    found: dict[int, _TextInProgress] = {}
    for number in numbers:
        ids = lines[number].ids
        most = min(sampling.max_tokens, engine.context - len(ids))
        seed = (sampling.seed + number) % (1 << 63)
        found[number] = _TextInProgress()
        own = replace(sampling, max_tokens=most, seed=seed)
        try:
            engine.submit(TextRequest(ids, own, ends), found[number])
        except QueueFull as failure:
            # The queue has room for all: an engine that has failed takes no more.
            raise CheckpointError(f"prompt {number + 1}: {engine.counts().failure}") from failure
    for number, written in found.items():
        written.ended.wait()
        if written.finish == "failed":
            raise CheckpointError(f"prompt {number + 1}: {written.message}")
    return {number: (written.tokens, written.finish) for number, written in found.items()}


def _result(
    number: int, line: PromptLine, written: tuple[list[int], str], tokenizer: Tokenizer
) -> dict[str, object]:
    tokens, finish = written
    return {
        "number": number,
        "prompt": line.given,
        "text": tokenizer.decode(tokens),
        "tokens": len(tokens),
        "finish": finish,
    }
