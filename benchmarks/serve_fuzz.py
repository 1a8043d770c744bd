"""Send odd bodies to a server: `python benchmarks/serve_fuzz.py URL --bodies 2000 --seed 1`.

Bodies are right ones with parts replaced, removed and added, and bytes that are no JSON. Every
answer must have a status of 2xx or 4xx, and JSON or events in it; afterwards the server must live.
"""

import argparse
import collections
import http.client
import json
import random
import sys
import urllib.parse
from collections.abc import Iterator
from typing import Any

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "prompt": "once",
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "best_of": 2,
        "stop": ["x", "yz"],
        "seed": 1,
        "echo": True,
        "logprobs": 2,
        "logit_bias": {"65": -5},
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "somebody",
        "presence_penalty": 0,
    },
    "/v1/chat/completions": {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        ],
        "max_tokens": 3,
        "temperature": 0,
        "n": 1,
        "stop": "x",
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        "tools": [],
        "stream": False,
    },
    "/v1/embeddings": {"input": ["a", "b"], "encoding_format": "base64"},
    "/tokenize": {"prompt": "once", "add_special_tokens": False, "return_token_strs": True},
    "/detokenize": {"tokens": [65, 66, 67]},
}
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, 10**30, 2**63, -(2**63), 1e-320),
    *("", " ", "a", "\0", "\ud800", "é€😀", "x" * 300, "text", "json_object", "<|endoftext|>"),
    *([], [[]], [1, "a"], [[1], [2, 3]], [-1], [10**9], ["a", ["b"]], [None], [True], ["", ""]),
    *({}, {"": 1}, {"-1": 5}, {"65": "b"}, {"type": "text"}, {"type": "json_schema"}),
    *([{"role": "user"}], [{"role": "user", "content": None}], [{"role": "tool", "content": "a"}]),
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
    {"type": "json_schema", "json_schema": {"schema": {"pattern": "((a+)+)+$", "type": "string"}}},
)
RAW = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe{}",
    b'{"a": NaN}',
    b"[" * 5000,
    b"1" * 5000,
    b'"\\ud800"',
)
NEEDED = ("messages", "input", "prompt", "tokens")
# A field, and another one that it belongs to.
PAIRS = (("stream_options", "stream"), ("top_logprobs", "logprobs"), ("best_of", "n"))
NAMES = ("suffix", "unknown", "tools", "frequency_penalty", "dimensions", "functions", "é", "")


def bodies(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield routes and bodies, the same ones for the same seed."""
    chance = random.Random(seed)
    for number in range(count):
        route = chance.choice(list(ROUTES))
        if number % 20 == 19:
            yield route, chance.choice(RAW)
            continue
        value = {
            name: each
            for name, each in ROUTES[route].items()
            if name in NEEDED or chance.random() < 0.7
        }
        for name, other in PAIRS:
            if other not in value:
                value.pop(name, None)
        for _ in range(chance.choice((0, 1, 1, 2, 3))):
            value = changed(value, chance)
        yield route, json.dumps(value).encode()


def changed(value: Any, chance: random.Random) -> Any:
    """Return a copy with one part replaced, removed or added, at any depth."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.15:
        return chance.choice(ODD)
    if isinstance(value, list):
        place = chance.randrange(len(value))
        return [*value[:place], changed(value[place], chance), *value[place + 1 :]]
    name = chance.choice(list(value))
    if chance.random() < 0.15:
        return {**value, chance.choice(NAMES): chance.choice(ODD)}
    if chance.random() < 0.1:
        return {key: each for key, each in value.items() if key != name}
    return {**value, name: changed(value[name], chance)}


def faults(url: str, given: Iterator[tuple[str, bytes]], token: str = "") -> Iterator[str]:
    """Send bodies; yield a line for each wrong answer, and at last one with the statuses."""
    place = urllib.parse.urlsplit(url).netloc
    connection = http.client.HTTPConnection(place, timeout=120)
    counts: collections.Counter[int] = collections.Counter()
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    for route, body in given:
        connection.request("POST", route, body, head)
        answer = connection.getresponse()
        content = answer.read()
        counts[answer.status] += 1
        if not (200 <= answer.status < 300 or 400 <= answer.status < 500):
            yield f"{answer.status} for {route} {body[:300]!r}: {content[:200]!r}"
        elif answer.headers["Content-Type"] == "application/json":
            found = json.loads(content)
            if answer.status >= 400 and not found["error"]["message"]:
                yield f"no message for {route} {body[:300]!r}"
        elif not content.endswith(b"data: [DONE]\n\n"):
            yield f"a stream without its end for {route} {body[:300]!r}"
    connection.request("GET", "/health")
    if connection.getresponse().status != 200:
        yield "the server is not well"
    connection.close()
    yield "statuses: " + ", ".join(f"{status} × {n:,}" for status, n in sorted(counts.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="such as http://127.0.0.1:8000")
    parser.add_argument("--bodies", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--token", default="", help="a bearer token, where the server asks for one")
    asked = parser.parse_args()
    lines = list(faults(asked.url, bodies(asked.bodies, asked.seed), asked.token))
    print("\n".join(lines))
    return int(len(lines) > 1)


if __name__ == "__main__":
    sys.exit(main())
