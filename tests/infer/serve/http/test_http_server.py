"""Bounds, departures and ends: what a server does when clients, jobs and engines misbehave."""

import http.client
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from mpillm.infer.serve.http.http_server import Closing
from mpillm.infer.serve.http.lifetime import HttpLimits
from tests.infer.serve.http.served import Server, serving, tiny_model

pytestmark = pytest.mark.usefixtures("processes")
ASKED = {"model": "tiny", "prompt": "abc", "max_tokens": 200, "temperature": 0}
# No end of text comes, so that a text has all its tokens.
ASKED["logit_bias"] = {"256": -100, "258": -100}


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def connect(server: Server, body: Any, path: str = "/v1/completions") -> http.client.HTTPConnection:
    """Send a request, and do not wait for its answer."""
    place = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(place, timeout=30)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, content, {"Content-Type": "application/json"})
    return connection


def ask(server: Server, body: Any, path: str = "/v1/completions") -> tuple[int, Any]:
    connection = connect(server, body, path)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def test_a_client_that_leaves_is_cancelled() -> None:
    with serving() as server:
        engine = server.engine
        for stream in (False, True):
            engine.hold.clear()
            connection = connect(server, {**ASKED, "stream": stream})
            until(lambda: bool(engine.counts().running))
            if stream:
                # The head comes at once, whenever the first token does.
                assert connection.getresponse().status == 200
            [job] = engine._open.values()
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            until(job.cancelled.is_set)
            engine.hold.set()
            until(lambda: not engine.counts().running)
        assert engine.counts().finished == {"cancelled": 2}
        until(lambda: not server.settings.lifetime.open_requests)


def test_a_full_queue_says_when_to_come_again() -> None:
    with serving(tiny_model(most_waiting=2)) as server:
        server.engine.hold.clear()
        waiting = [connect(server, ASKED) for _ in range(2)]
        until(lambda: bool(server.engine.counts().waiting))
        connection = connect(server, ASKED)
        answer = connection.getresponse()
        assert answer.status == 429
        assert answer.headers["Retry-After"] == "2"
        assert json.loads(answer.read())["error"]["code"] == "queue_full"
        # Of a request for two texts, neither stays in the queue.
        assert ask(server, {**ASKED, "n": 2})[0] == 429
        assert len(server.engine._open) == 2
        server.engine.hold.set()
        assert [each.getresponse().status for each in waiting] == [200, 200]


def test_bodies_are_bounded() -> None:
    with serving(limits=HttpLimits(body_bytes=1000, body_seconds=1.0)) as server:
        status, body = ask(server, b'{"prompt": "' + b"a" * 2000 + b'"}')
        assert (status, body["error"]["type"]) == (413, "invalid_request_error")
        place = server.url.removeprefix("http://")
        chunked = http.client.HTTPConnection(place, timeout=30)
        head = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        body = iter([b"x" * 600] * 3)
        chunked.request("POST", "/v1/completions", body, head, encode_chunked=True)
        assert chunked.getresponse().status == 413
        slow = http.client.HTTPConnection(place, timeout=30)
        slow.putrequest("POST", "/v1/completions")
        for name, value in {"Content-Type": "application/json", "Content-Length": "10"}.items():
            slow.putheader(name, value)
        slow.endheaders()
        assert slow.getresponse().status == 408
        # What a page of another site may send without being asked is refused.
        plain = http.client.HTTPConnection(place, timeout=30)
        plain.request("POST", "/v1/completions", b"{}", {"Content-Type": "text/plain"})
        assert plain.getresponse().status == 415
        named = http.client.HTTPConnection(place, timeout=30)
        named.request("GET", "/v1/models", headers={"Host": "evil.example:8000"})
        assert named.getresponse().status == 403


def test_a_head_that_never_ends_is_closed() -> None:
    with serving(limits=HttpLimits(head_seconds=0.5)) as server:
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
            assert slow.recv(100) == b""
        # One whose answer takes longer is left alone.
        server.engine.hold.clear()
        connection = connect(server, {**ASKED, "max_tokens": 2})
        time.sleep(0.8)
        server.engine.hold.set()
        assert connection.getresponse().status == 200


def test_curl_streams() -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")
    body = json.dumps({**ASKED, "max_tokens": 3, "stream": True})
    with serving() as server:
        place = f"{server.url}/v1/completions"
        words = [curl, "-sS", "-N", "-H", "Content-Type: application/json", "-d", "@-", place]
        done = subprocess.run(words, input=body, text=True, capture_output=True, check=True)
        events = done.stdout.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        texts = [json.loads(each[6:])["choices"][0]["text"] for each in events[:-2]]
        assert len("".join(texts)) == 3
        # curl asks before it sends a large body, and gets its answer at once.
        large = subprocess.run(
            [*words, "-o", "/dev/null", "-w", "%{http_code}"],
            input="x" * (5 << 20),
            text=True,
            capture_output=True,
            check=True,
        )
        assert large.stdout == "413"


def test_an_answer_has_a_time_limit() -> None:
    with serving(limits=HttpLimits(answer_seconds=0.3)) as server:
        server.engine.hold.clear()
        status, body = ask(server, ASKED)
        assert (status, body["error"]["code"]) == (408, "timeout")
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match=r"longer than 0\.3 seconds"):
            list(client.completions.create(**ASKED, stream=True))
        server.engine.hold.set()
        until(lambda: server.engine.counts().finished == {"cancelled": 2})


def test_a_drained_server_finishes_what_runs() -> None:
    with serving() as server:
        server.engine.hold.clear()
        running = connect(server, ASKED)
        until(lambda: bool(server.engine.counts().running))
        server.signals.send(signal.SIGUSR1)
        until(lambda: server.settings.lifetime.draining)
        connection = connect(server, ASKED)
        answer = connection.getresponse()
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert json.loads(answer.read())["error"]["code"] == "draining"
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"status": "alive"}')
        connection.request("GET", "/ready")
        assert connection.getresponse().status == 503
        server.engine.hold.set()
        assert json.loads(running.getresponse().read())["usage"]["completion_tokens"] == 200
        assert server.join() == "drained"


def test_the_end_of_the_job_drains_and_ends_what_takes_too_long() -> None:
    with serving(closing=Closing(drain_at=time.time() + 3600)) as server:
        assert ask(server, {**ASKED, "max_tokens": 2})[0] == 200
        server.engine.hold.clear()
        stream = connect(server, {**ASKED, "stream": True}).getresponse()
        # As if the hour were over now.
        server.server._closing = Closing(drain_at=time.time(), drain_seconds=0.3)
        events = stream.read().decode()
        assert '"code": "ending"' in events
        assert "[DONE]" not in events
        assert server.join() == "drained"


def test_sigterm_ends_at_once_also_while_draining() -> None:
    with serving() as server:
        server.engine.hold.clear()
        connection = connect(server, ASKED)
        until(lambda: bool(server.engine.counts().running))
        server.signals.send(signal.SIGUSR1)
        until(lambda: server.settings.lifetime.draining)
        server.signals.send(signal.SIGTERM)
        answer = connection.getresponse()
        assert answer.status == 503
        assert server.join() == "interrupted"
    with pytest.raises(OSError):  # noqa: PT011
        ask(server, ASKED)


def test_a_failed_engine_ends_streams_by_an_event() -> None:
    with serving() as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = iter(client.completions.create(**ASKED, stream=True))
        next(stream)
        threading.Timer(0.01, server.engine.fail, ("rank 1 is gone",)).start()
        with pytest.raises(openai.APIError, match="rank 1 is gone"):
            list(stream)
        assert server.join() == "failed"
