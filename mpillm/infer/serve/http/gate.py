"""What every request passes, as ASGI: tokens, bounds, draining; then metrics and the audit log."""

import ipaddress
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpillm.infer.serve.http.audit_log import AuditLog
from mpillm.infer.serve.http.bearer_tokens import BearerTokens
from mpillm.infer.serve.http.event_stream import ClientGone, error_answer
from mpillm.infer.serve.http.forms.api_error import ApiError, retry_later
from mpillm.infer.serve.http.lifetime import HttpLimits, Lifetime
from mpillm.infer.serve.http.request_record import RequestRecord
from mpillm.infer.serve.http.server_metrics import ServerMetrics

# Anybody may ask whether the server is there, and for the page, which asks for a token itself.
OPEN_ROUTES = frozenset({"/", "/health", "/ready"})
# Whatever else is asked for counts as one route: a scan must not fill the metrics.
OTHER_ROUTE = "other"
METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH"})
# A client that is still sending does not read: so much more is taken before it gets its answer.
MOST_DISCARDED = 4
GONE_STATUS = 499
"""nginx's status of a request whose client left: in the metrics alone."""
SAFE_HEADERS: Mapping[bytes, bytes] = MappingProxyType(
    {b"x-content-type-options": b"nosniff", b"referrer-policy": b"no-referrer"}
)


@dataclass(frozen=True)
class GateSettings:
    """What the gate knows of. `tokens` None: anybody who reaches the port may ask."""

    routes: frozenset[str]
    limits: HttpLimits
    lifetime: Lifetime
    metrics: ServerMetrics
    tokens: BearerTokens | None = None
    audit: AuditLog | None = None


class Gate:
    """Let a request pass to the application, or answer it."""

    def __init__(self, app: ASGIApp, settings: GateSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        record = RequestRecord(
            path if path in self._settings.routes else OTHER_ROUTE,
            method if method in METHODS else OTHER_ROUTE,
        )
        scope.setdefault("state", {})["record"] = record
        self._settings.lifetime.open_requests += 1
        try:
            await self._pass(scope, receive, _noting(send, record), record)
        finally:
            self._settings.lifetime.open_requests -= 1
            record.status = record.status or GONE_STATUS
            self._settings.metrics.count(record)
            if self._settings.audit is not None:
                self._settings.audit.write(record)

    async def _pass(
        self, scope: Scope, receive: Receive, send: Send, record: RequestRecord
    ) -> None:
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        most = self._settings.limits.body_bytes
        try:
            self._check(scope, headers, record)
        except ApiError as failure:
            if failure.status == 413:
                await _discard(receive, MOST_DISCARDED * most)
            await error_answer(failure)(scope, receive, send)
            return
        try:
            await self._app(scope, _bounded(receive, most), send)
        except (ClientGone, ClientDisconnect):
            record.status = GONE_STATUS
        except Exception:
            # The application around the gate answers it.
            record.status = 500
            raise

    def _check(self, scope: Scope, headers: Mapping[str, str], record: RequestRecord) -> None:
        settings = self._settings
        if settings.tokens is None:
            check_host(headers.get("host", ""))
        elif record.route not in OPEN_ROUTES:
            record.token = settings.tokens.check(headers.get("authorization")).name
        if settings.lifetime.draining and scope["method"] == "POST":
            reason = "the server ends and takes no new requests; repeat this one later"
            raise retry_later(503, reason, settings.lifetime.retry_seconds, "draining")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > settings.limits.body_bytes:
            raise _too_large(settings.limits.body_bytes)


def check_host(host: str) -> None:
    """Raise ApiError unless the header Host names an address or this host.

    Else a page of another site could have its own name lead here, and read the answers.
    """
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name.lower().rstrip(".") in ("localhost", ""):
        return
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        raise ApiError(
            403,
            f"the request is for the host {host[:100]!r}; without tokens this server answers "
            "localhost and addresses alone",
        ) from None


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most:,} bytes; send less at once")


def _bounded(receive: Receive, most: int) -> Receive:
    """Count the bytes of a body without a length. The returned function raises ApiError."""
    count = 0

    async def take() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > most:
            if message.get("more_body"):
                await _discard(receive, MOST_DISCARDED * most)
            raise _too_large(most)
        return message

    return take


async def _discard(receive: Receive, most: int) -> None:
    """Read the rest of a body, up to `most` bytes and some seconds."""
    end = time.monotonic() + 5
    while most > 0 and time.monotonic() < end:
        message = await receive()
        most -= len(message.get("body", b"")) or 1
        if not message.get("more_body"):
            return


def _noting(send: Send, record: RequestRecord) -> Send:
    """Note the status, and add the headers that every answer has."""

    async def note(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            message = {**message, "headers": [*message["headers"], *SAFE_HEADERS.items()]}
        await send(message)

    return note
