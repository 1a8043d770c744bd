"""Serve a model over HTTP on all ranks: the work of `mpillm serve`."""

import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_root
from mpillm.comm.waiting import patient_bcast
from mpillm.errors import CommError, StoppedError
from mpillm.infer.chat_prompt import answer_ends
from mpillm.infer.serve.http.audit_log import AuditLog
from mpillm.infer.serve.http.bearer_tokens import BearerTokens
from mpillm.infer.serve.http.gate import GateSettings
from mpillm.infer.serve.http.http_server import Closing, End, HttpServer
from mpillm.infer.serve.http.lifetime import HttpLimits, Lifetime
from mpillm.infer.serve.http.listening import (
    ListeningOptions,
    open_listener,
    tls_context,
    tunnel_command,
    url_of,
)
from mpillm.infer.serve.http.served_model import ServedModel
from mpillm.infer.serve.http.server_metrics import ServerMetrics
from mpillm.infer.serve.open_engine import EngineOptions, OpenedEngine, open_engine
from mpillm.launch.batch_script import stop_seconds_for
from mpillm.launch.signals import StopSignals
from mpillm.system.console import Console

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class JobFacts:
    """The batch job around the server, where there is one."""

    started: float
    """Unix seconds, as those of `ends_at`."""
    ends_at: float | None = None
    submit_host: str = ""
    in_batch: bool = False


@dataclass(frozen=True)
class ServeOptions:
    """What `mpillm serve` was asked for; of the engine, see EngineOptions."""

    trained: Path
    listening: ListeningOptions
    names: tuple[str, ...] = ()
    """The names of the model; else that of the folder."""
    audit: Path | None = None
    limits: HttpLimits = field(default_factory=HttpLimits)
    drain_seconds: float = 600.0


@dataclass(frozen=True)
class _Opened:
    """What rank 0 opens ahead of the weights, so that a mistake shows at once."""

    listener: socket.socket
    tls: ssl.SSLContext | None
    tokens: BearerTokens | None
    audit: AuditLog | None

    @classmethod
    def of(cls, options: ServeOptions, warn: Callable[[str], None]) -> "_Opened":
        listening = options.listening
        tls = tls_context(listening)
        tokens = None if listening.tokens is None else BearerTokens(listening.tokens)
        listener = open_listener(listening)
        audit = None if options.audit is None else AuditLog(options.audit, warn)
        return cls(listener, tls, tokens, audit)


def serve_model(
    options: ServeOptions,
    engine: EngineOptions,
    comm: "MPI.Intracomm",
    console: Console,
    signals: StopSignals,
    job: JobFacts,
) -> None:
    """Serve until a signal, or the job's end. Every rank calls it; rank 0 speaks HTTP.

    Raises StoppedError once it has drained, KeyboardInterrupt where it was ended at once.
    """
    opened: list[_Opened] = []
    on_root(comm, lambda: opened.append(_Opened.of(options, console.warn)))
    end: End = "interrupted"
    # Outside of the block below: while weights load, a signal ends the ranks at once.
    started = open_engine(options.trained, engine, comm, console)
    with signals.orderly():
        if comm.rank == 0:
            end = _serve_here(started, options, opened[0], console, signals, job)
        else:
            started.follow()
        if end == "failed":
            raise CommError(f"the engine failed: {started.own.counts().failure}")
        end = patient_bcast(comm, end)
    if end == "interrupted":
        raise KeyboardInterrupt
    raise StoppedError("the server has drained: start it again to serve on")


def _serve_here(
    started: OpenedEngine,
    options: ServeOptions,
    opened: _Opened,
    console: Console,
    signals: StopSignals,
    job: JobFacts,
) -> End:
    """Serve on rank 0; the engine is closed at the end."""
    names = options.names or (options.trained.resolve().name,)
    ends = answer_ends(started.tokenizer, started.template)
    model = ServedModel(names, started.own, started.tokenizer, started.template, ends)
    settings = GateSettings(
        frozenset(),
        options.limits,
        Lifetime(),
        ServerMetrics(started.own.counts),
        opened.tokens,
        opened.audit,
    )
    drain_at = None
    if job.ends_at is not None:
        drain_at = job.ends_at - stop_seconds_for(max(3, int(job.ends_at - job.started)))
    closing = Closing(drain_at, job.ends_at, options.drain_seconds)
    url = url_of(opened.listener, options.listening.host, opened.tls is not None)

    def say_where() -> None:
        for line in greeting(model, url, options.listening, job):
            console.say(line)

    server = HttpServer(model, settings, signals, console, closing)
    return server.run(opened.listener, opened.tls, say_where)


def greeting(model: ServedModel, url: str, listening: ListeningOptions, job: JobFacts) -> list[str]:
    """Write where the model is served, and how to ask it."""
    chats = model.template is not None
    asked = '"messages": [{"role": "user", "content": "Hello"}]' if chats else '"prompt": "Hello"'
    path = "chat/completions" if chats else "completions"
    head = ""
    if listening.certificate is not None:
        head += f" --cacert {listening.certificate}"
    if listening.tokens is not None:
        head += " -H 'Authorization: Bearer TOKEN'"
    lines = [
        f"serving {', '.join(model.names)} with a context of {model.context:,} tokens at {url}",
        f"a page to talk to it: {url}/",
        f"curl{head} {url}/v1/{path} -H 'Content-Type: application/json' \\",
        f'  -d \'{{"model": "{model.name}", {asked}}}\'',
    ]
    if not chats:
        lines.append("it has no chat template: /v1/chat/completions is refused")
    if listening.tokens is None:
        lines.append("every user of this host may ask it: --tokens FILE lets in who has a token")
    if job.in_batch:
        port = int(url.rpartition(":")[2])
        host = socket.gethostname()
        lines.append(f"from your machine: {tunnel_command(port, host, job.submit_host)}")
    return lines
