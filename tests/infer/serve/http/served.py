"""A server over a small model of the plain engine, in a thread of the test's own process."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from mpi4py import MPI

from mpillm.infer.chat_prompt import answer_ends
from mpillm.infer.import_model import import_model
from mpillm.infer.serve.http.audit_log import AuditLog
from mpillm.infer.serve.http.bearer_tokens import BearerTokens
from mpillm.infer.serve.http.gate import GateSettings
from mpillm.infer.serve.http.http_server import Closing, HttpServer
from mpillm.infer.serve.http.lifetime import HttpLimits, Lifetime
from mpillm.infer.serve.http.listening import (
    ListeningOptions,
    open_listener,
    tls_context,
    url_of,
)
from mpillm.infer.serve.http.served_model import ServedModel
from mpillm.infer.serve.http.server_metrics import ServerMetrics
from mpillm.models.decoder import DecoderConfig
from mpillm.models.part_module import create
from mpillm.system.console import Console
from mpillm.tokens.chat.chat_template import ChatTemplate
from mpillm.tokens.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from tests.fixtures.held_engine import HeldEngine
from tests.published import publish

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(plain: Tokenizer | None = None) -> Tokenizer:
    """Return bytes, the end of text, and the two tokens of the template."""
    inner = tokenizers.Tokenizer.from_str((plain or byte_tokenizer()).to_json())
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer.from_json(inner.to_str(), "bytes of a chat")


def tiny_model(
    context: int = 256, most_waiting: int = 64, chats: bool = True, seed: int = 3
) -> ServedModel:
    """Return an untrained model, always the same, with its engine."""
    tokenizer = chat_tokenizer()
    spec = DecoderConfig(
        layers=2, width=32, heads=4, kv_heads=2, context=context, vocab_size=tokenizer.vocab_size
    )
    engine = HeldEngine(create(spec, seed).eval(), most_waiting)
    template = ChatTemplate(TEMPLATE, {}) if chats else None
    ends = answer_ends(tokenizer, template)
    return ServedModel(("tiny", "alias"), engine, tokenizer, template, ends)


@dataclass
class Signals:
    """What launch/signals.py records, set by a test: a thread gets no signals."""

    number: int = 0
    newest: int = 0

    def send(self, number: int) -> None:
        self.number, self.newest = self.number or number, number


@dataclass
class Server:
    model: ServedModel
    url: str
    signals: Signals
    settings: GateSettings
    thread: threading.Thread
    ends: list[Any]
    server: HttpServer

    @property
    def engine(self) -> HeldEngine:
        return self.model.engine

    def settle(self) -> None:
        """Wait until every request is counted, which comes after its answer."""
        end = time.monotonic() + 20
        while self.settings.lifetime.open_requests:
            assert time.monotonic() < end
            time.sleep(0.01)

    def join(self) -> str:
        """Wait for the end, and return its reason."""
        self.thread.join(30)
        assert not self.thread.is_alive()
        [found] = self.ends
        return found


@contextlib.contextmanager
def serving(
    model: ServedModel | None = None,
    options: ListeningOptions | None = None,
    limits: HttpLimits | None = None,
    audit: Path | None = None,
    closing: Closing | None = None,
    console: Console | None = None,
) -> Iterator[Server]:
    """Serve until the block ends."""
    model, options = model or tiny_model(), options or ListeningOptions(port=0)
    console = console or Console(speaks=False)
    settings = GateSettings(
        frozenset(),
        limits or HttpLimits(),
        Lifetime(),
        ServerMetrics(model.engine.counts),
        options.tokens and BearerTokens(options.tokens),
        audit and AuditLog(audit, console.warn),
    )
    listener, tls, signals = open_listener(options), tls_context(options), Signals()
    url = url_of(listener, options.host, tls is not None)
    server = HttpServer(model, settings, signals, console, closing or Closing())
    started, ends = threading.Event(), []
    thread = threading.Thread(
        target=lambda: ends.append(server.run(listener, tls, started.set)), daemon=True
    )
    thread.start()
    assert started.wait(30)
    try:
        yield Server(model, url, signals, settings, thread, ends, server)
    finally:
        signals.send(15)
        thread.join(30)
        assert not thread.is_alive()


def publish_chat(folder: Path, context: int = 128) -> Path:
    """Import a small published model that has the template, as a run; return its folder."""
    spec = DecoderConfig(
        layers=2,
        width=32,
        heads=4,
        kv_heads=2,
        hidden=64,
        context=context,
        vocab_size=280,
        tied=False,
    )
    hub = publish(folder / "hub", spec)
    # With merges, which llama.cpp's files have.
    tokenizer = chat_tokenizer(train_bpe(["the cat sat on the mat "], 270))
    (hub / "tokenizer.json").write_text(tokenizer.to_json())
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps({**config, "eos_token_id": tokenizer.eot_id}))
    (hub / "chat_template.jinja").write_text(TEMPLATE)
    import_model(hub, folder / "chat", MPI.COMM_SELF, Console(speaks=False))
    return folder / "chat"
