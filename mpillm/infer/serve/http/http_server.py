"""Run the application by uvicorn until a signal, the job's end or a failure of the engine."""

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import uvicorn

from mpillm.infer.serve.http.app import make_app
from mpillm.infer.serve.http.gate import GateSettings
from mpillm.infer.serve.http.served_model import ServedModel
from mpillm.launch.signals import ENDING, StopSignals
from mpillm.system.console import Console, counted
from mpillm.system.ending_signals import signal_name

# A tenth of a second until a signal is seen; uvicorn itself wakes as often.
POLL_SECONDS = 0.1
# So long may open answers take to end by an error, once the engine has ended.
LAST_WORDS_SECONDS = 2.0
# Ahead of the job's end, whatever still runs is ended: the ranks must leave by themselves.
LEAVE_SECONDS = 10.0
# The longest head of a request; a bearer token has some dozen bytes.
LONGEST_HEAD = 1 << 15

End = Literal["drained", "interrupted", "failed"]


@dataclass(frozen=True)
class Closing:
    """When the server ends by itself, in unix seconds, and how long it may drain."""

    drain_at: float | None = None
    ends_at: float | None = None
    drain_seconds: float = 600.0


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to us."""
        yield


class _SlowHeads:
    """Close connections on which no request is open, nor begins in time.

    uvicorn bounds the time between requests, and not that of a head which never ends.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: dict[Any, float] = {}

    def close(self, connections: Iterable[Any]) -> None:
        """Close those that have waited for `seconds`; called in turns."""
        now, before = time.monotonic(), self._since
        waiting = [each for each in connections if _is_waiting(each)]
        self._since = {each: before.get(each, now) for each in waiting}
        for each, since in self._since.items():
            if now - since > self._seconds and each.transport is not None:
                each.transport.close()


def _is_waiting(connection: Any) -> bool:
    cycle = getattr(connection, "cycle", None)
    return cycle is None or bool(cycle.response_complete)


class HttpServer:
    """Answer requests on a socket, on rank 0, in the main thread."""

    def __init__(
        self,
        model: ServedModel,
        settings: GateSettings,
        signals: StopSignals,
        console: Console,
        closing: Closing,
    ) -> None:
        self._model, self._settings, self._closing = model, settings, closing
        self._signals, self._console = signals, console
        self._drained = asyncio.Event()

    def run(
        self, listener: socket.socket, tls: ssl.SSLContext | None, on_start: Callable[[], None]
    ) -> End:
        """Serve until the end; return why it came. `on_start` is called once it listens."""
        return asyncio.run(self._run(listener, tls, on_start))

    async def _run(
        self, listener: socket.socket, tls: ssl.SSLContext | None, on_start: Callable[[], None]
    ) -> End:
        config = uvicorn.Config(
            make_app(self._model, self._settings),
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            lifespan="off",
            ws="none",
            http="h11",
            h11_max_incomplete_event_size=LONGEST_HEAD,
            limit_concurrency=self._settings.limits.connections,
            timeout_graceful_shutdown=round(LAST_WORDS_SECONDS),
        )
        config.load()
        config.ssl = tls
        server = _Uvicorn(config)
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        on_start()
        try:
            return await self._watch(server, serving)
        finally:
            # Whatever is still computed ends by an event that says so.
            await asyncio.to_thread(self._model.engine.close)
            await self._quiet(time.time() + LAST_WORDS_SECONDS)
            server.should_exit = True
            await serving

    async def _watch(self, server: _Uvicorn, serving: "asyncio.Future[None]") -> End:
        """Wait for the end, and let requests finish where there is time for them."""
        limit, slow = float("inf"), _SlowHeads(self._settings.limits.head_seconds)
        while True:
            await asyncio.sleep(POLL_SECONDS)
            slow.close(server.server_state.connections)
            if self._signals.newest in ENDING:
                return "interrupted"
            if self._model.engine.counts().failure:
                await self._quiet(time.time() + LAST_WORDS_SECONDS)
                return "failed"
            if serving.done():
                serving.result()
                return "interrupted"
            now = time.time()
            lifetime = self._settings.lifetime
            if lifetime.draining:
                done = self._drained.is_set() and not lifetime.open_requests
                if done or now >= limit:
                    return "drained"
            elif reason := self._drain_reason(now):
                limit = self._begin_draining(reason, now)

    def _drain_reason(self, now: float) -> str:
        if self._signals.number:
            return signal_name(self._signals.number)
        drain_at = self._closing.drain_at
        return "the job's end is near" if drain_at is not None and now >= drain_at else ""

    def _begin_draining(self, reason: str, now: float) -> float:
        """Refuse new requests; return when those that run are ended all the same."""
        lifetime, closing = self._settings.lifetime, self._closing
        lifetime.draining = True
        limit = now + closing.drain_seconds
        if closing.ends_at is not None:
            limit = min(limit, closing.ends_at - LEAVE_SECONDS)
        running = counted(lifetime.open_requests, "request")
        self._console.say(f"{reason}: draining, {running} to finish, no new ones are taken")
        loop = asyncio.get_running_loop()

        def drain() -> None:
            self._model.engine.drain()
            with contextlib.suppress(RuntimeError):
                # The loop is closed where the time was up first.
                loop.call_soon_threadsafe(self._drained.set)

        # Its own thread, as a daemon: an engine that never finishes must not keep the process.
        threading.Thread(target=drain, name="drain", daemon=True).start()
        return limit

    async def _quiet(self, limit: float) -> None:
        """Wait until no request is open, or until `limit`."""
        while self._settings.lifetime.open_requests and time.time() < limit:
            await asyncio.sleep(POLL_SECONDS / 2)
