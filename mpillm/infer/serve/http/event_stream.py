"""Answers that notice a client's departure: one JSON object, or server-sent events."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mpillm.infer.serve.http.forms.api_error import ApiError
from mpillm.system.json_text import to_json

DONE = b"data: [DONE]\n\n"
# A comment of the format, which clients pass over.
QUIET = b": \n\n"
# Without these, proxies keep events until there are many.
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client has closed the connection: nothing is answered."""


def json_answer(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Make an answer of one JSON object."""
    return Response(to_json(value), status, headers, "application/json")


def error_answer(failure: ApiError) -> Response:
    """Make the answer to a request that failed."""
    return json_answer(failure.body(), failure.status, failure.headers)


async def until_gone(request: Request, work: Awaitable[Result], seconds: float) -> Result:
    """Wait for `work`, whose request was read whole. Raises ClientGone where the client leaves
    first, and ApiError after `seconds`; either cancels the work.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(request.receive))
    try:
        done, _ = await asyncio.wait(
            (working, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if working in done:
            return working.result()
        raise ClientGone if gone in done else out_of_time(seconds)
    finally:
        await _end(working)
        await _end(gone)


def out_of_time(seconds: float) -> ApiError:
    """Make the error of a text that takes too long."""
    reason = f"the answer took longer than {seconds:g} seconds; ask for fewer tokens"
    return ApiError(408, reason, code="timeout")


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: "asyncio.Future[Any]") -> None:
    """Cancel a task, and wait until it has tidied up."""
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task


class EventStream(Response):
    """Server-sent events, one a JSON object, and `[DONE]`. A failure becomes an event, too."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[dict[str, Any] | None],
        close: Callable[[], None],
        seconds: float,
    ) -> None:
        """`events`: the objects, None for a sign that the connection is alive.

        `close` is called at the end, whatever ends the stream; `seconds`: of the whole of it.
        """
        super().__init__(headers=HEADERS)
        # The length of the body is not known yet.
        del self.headers["content-length"]
        self._events, self._close, self._seconds = events, close, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._close()
            await _end(sending)
            await _end(gone)

    async def _send(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        try:
            async with asyncio.timeout(self._seconds):
                async for event in self._events:
                    await _body(send, QUIET if event is None else as_event(event))
            await _body(send, DONE)
        except TimeoutError:
            await _body(send, as_event(out_of_time(self._seconds).body()))
        except ApiError as failure:
            # The status is sent: the client finds the error among the events.
            await _body(send, as_event(failure.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def as_event(value: Any) -> bytes:
    """Write an object as an event. JSON escapes line ends, so it is one line."""
    return f"data: {to_json(value)}\n\n".encode()


async def _body(send: Send, content: bytes) -> None:
    await send({"type": "http.response.body", "body": content, "more_body": True})
