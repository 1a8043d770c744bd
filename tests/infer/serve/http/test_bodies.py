"""Wrong and odd bodies: the field is named, and no body is answered by a fault of the server."""

import importlib.util
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.infer.serve.http.served import Server, serving

pytestmark = pytest.mark.usefixtures("processes")
FUZZ = Path(__file__).parents[4] / "benchmarks" / "serve_fuzz.py"
COMPLETE, CHAT, EMBED = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


def post(server: Server, path: str, body: Any) -> tuple[int, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, content, head)) as a:
            return a.status, json.loads(a.read())
    except urllib.error.HTTPError as failure:
        return failure.code, json.loads(failure.read())["error"]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (COMPLETE, b"\xff", None, "not UTF-8: byte 0"),
        (COMPLETE, b"{", None, "not JSON"),
        (COMPLETE, b"[1]", None, "a list; send a JSON object"),
        (COMPLETE, {"prompt": "a", "max_tokens": 0}, "max_tokens", "no token is asked for"),
        (COMPLETE, {"prompt": "a", "max_tokens": True}, "max_tokens", "a whole number"),
        (COMPLETE, {"prompt": "a", "max_tokens": 2.5}, "max_tokens", "a whole number"),
        (COMPLETE, {"prompt": "a" * 257}, "prompt", "context is 256 tokens"),
        (COMPLETE, {"prompt": "a", "max_tokens": 256}, "max_tokens", "lower max_tokens"),
        (COMPLETE, {"prompt": [1, 259]}, "prompt", "from 0 to 258"),
        (COMPLETE, {"prompt": []}, "prompt", "an empty list"),
        (COMPLETE, {"prompt": [[]]}, "prompt", "without tokens"),
        (COMPLETE, {"prompt": "\ud800"}, "prompt", "surrogate"),
        (COMPLETE, {"temperature": 2.5}, "temperature", "from 0 to 2"),
        (COMPLETE, b'{"temperature": NaN}', "temperature", "from 0 to 2"),
        (COMPLETE, {"top_p": "1"}, "top_p", "a number, and not a text"),
        (COMPLETE, {"stop": ["a"] * 17}, "stop", "17 texts"),
        (COMPLETE, {"stop": [""]}, "stop", "1 to 256 characters"),
        (COMPLETE, {"stop": {"a": 1}}, "stop", "a text or a list"),
        (COMPLETE, {"logit_bias": {"x": 1}}, "logit_bias", "numbers of tokens"),
        (COMPLETE, {"logit_bias": {"900": 1}}, "logit_bias", "from 0 to 258"),
        (COMPLETE, {"logit_bias": {"9": 101}}, "logit_bias", "-100 to 100"),
        (COMPLETE, {"n": 3, "best_of": 2}, "best_of", "less than n"),
        (COMPLETE, {"best_of": 2, "stream": True}, "best_of", "stream"),
        (COMPLETE, {"suffix": "b"}, "suffix", "not supported"),
        (COMPLETE, {"presence_penalty": 1}, "presence_penalty", "not computed"),
        (COMPLETE, {"prompt": ["a"] * 200, "n": 2}, "prompt", "200 × 2 texts"),
        (COMPLETE, {"stream_options": {}}, "stream_options", "stream: true"),
        (COMPLETE, {"stream": True, "stream_options": {"a": 1}}, "a", "stream_options"),
        (COMPLETE, {"colour": "red"}, "colour", "unknown fields: 'colour'"),
        (COMPLETE, {"model": 3}, "model", "a text"),
        (EMBED, {"input": "a"}, "input", "embeds no text"),
        (EMBED, {"input": []}, "input", "a text"),
        (EMBED, {"input": "a", "encoding_format": "xml"}, "encoding_format", "float, base64"),
        ("/tokenize", {}, "prompt", "missing"),
        ("/detokenize", {"tokens": [1, "a"]}, "tokens", "a whole number"),
    ],
)
def test_a_wrong_field_is_named(
    server: Server, path: str, body: Any, param: str | None, message: str
) -> None:
    status, found = post(server, path, body)
    assert status == 400
    assert found["param"] == param
    assert message in found["message"]
    assert found["type"] == "invalid_request_error"


def test_what_is_not_here(server: Server) -> None:
    status, found = post(server, COMPLETE, {"model": "gpt-4", "prompt": "a"})
    assert (status, found["code"]) == (404, "model_not_found")
    assert post(server, "/v1/images", {})[0] == 404
    assert post(server, "/v1/models", {})[0] == 405


def test_the_tokenizer_s_routes(server: Server) -> None:
    """As lm-eval's remote tokenizer asks."""
    end = server.model.tokenizer.end_of_text
    asked = {"prompt": f"aé{end}", "add_special_tokens": False, "return_token_strs": True}
    status, found = post(server, "/tokenize", asked)
    assert status == 200
    assert found["tokens"] == [97, 195, 169, 256]
    assert found["token_strs"] == ["a", "bytes:\\xc3", "bytes:\\xa9", end]
    assert (found["count"], found["max_model_len"]) == (4, 256)
    assert post(server, "/detokenize", {"tokens": found["tokens"]})[1] == {"prompt": f"aé{end}"}
    messages = [{"role": "user", "content": "a"}]
    _, chat = post(server, "/tokenize", {"messages": messages})
    assert chat["tokens"] == server.model.chat_prompt(messages)
    with urllib.request.urlopen(server.url + "/tokenizer_info") as answer:
        info = json.loads(answer.read())
    assert info["eos_token"] == end
    assert info["chat_template"] == server.model.template.text


def test_odd_bodies_are_the_client_s_fault(server: Server) -> None:
    """As benchmarks/serve_fuzz.py does with 2,000."""
    spec = importlib.util.spec_from_file_location("serve_fuzz", FUZZ)
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    lines = list(fuzz.faults(server.url, fuzz.bodies(120, 5)))
    assert lines[:-1] == []
    assert "200 ×" in lines[-1]
    assert "400 ×" in lines[-1]
