"""Bearer tokens: the file, who is let in, how often, and that no token is written anywhere."""

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mpillm.errors import UsageError
from mpillm.infer.serve.http.bearer_tokens import BearerTokens, new_token
from mpillm.infer.serve.http.forms.api_error import ApiError
from mpillm.infer.serve.http.listening import ListeningOptions
from tests.infer.serve.http.served import Server, serving

pytestmark = pytest.mark.usefixtures("processes")


def ask(
    server: Server, path: str, token: str | None = None, body: Any = None, **headers: str
) -> tuple[int, Any, Any]:
    """Return the status, the headers and the JSON of an answer."""
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    headers |= {"Content-Type": "application/json"} if data is not None else {}
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            content = answer.read().decode()
            is_json = answer.headers["Content-Type"] == "application/json"
            return answer.status, answer.headers, json.loads(content) if is_json else content
    except urllib.error.HTTPError as failure:
        return failure.code, failure.headers, json.loads(failure.read())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


@pytest.fixture
def guarded(file: Path, tmp_path: Path) -> Iterator[tuple[Server, str]]:
    token = new_token(file, "anna")
    options = ListeningOptions(port=0, tokens=file)
    with serving(options=options, audit=tmp_path / "audit.jsonl") as server:
        yield server, token


def test_who_has_no_token_is_refused(guarded: tuple[Server, str], file: Path) -> None:
    server, token = guarded
    for wrong in (None, "", "mpillm-wrong", token[:-1], token + "x", "é"):
        status, headers, body = ask(
            server, "/v1/models", wrong and wrong.encode().decode("latin-1")
        )
        assert status == 401
        assert headers["WWW-Authenticate"] == "Bearer"
        assert body["error"]["code"] == "invalid_api_key"
    assert ask(server, "/v1/models", token)[0] == 200
    for path in ("/metrics", "/tokenizer_info", "/nowhere"):
        assert ask(server, path)[0] == 401
    for path in ("/", "/health", "/ready"):
        assert ask(server, path)[0] == 200
    # A token is taken away while the server runs, and another one is given.
    file.unlink()
    assert ask(server, "/v1/models", token)[0] == 401
    other = new_token(file, "ben")
    assert ask(server, "/v1/models", other)[0] == 200
    assert ask(server, "/v1/models", token)[0] == 401


def test_a_token_ends_and_has_a_rate(file: Path) -> None:
    ended = new_token(file, "ended", days=-1)
    slow = new_token(file, "slow", days=1, requests_a_minute=2)
    tokens = BearerTokens(file)
    with pytest.raises(ApiError, match="expired") as found:
        tokens.check(f"Bearer {ended}")
    assert found.value.status == 401
    assert tokens.check(f"bearer {slow}").name == "slow"
    tokens.check(f"Bearer {slow}")
    with pytest.raises(ApiError, match="2 times a minute") as found:
        tokens.check(f"Bearer {slow}")
    assert found.value.status == 429
    assert 0 < int(found.value.headers["Retry-After"]) <= 30
    tokens._buckets["slow"].filled -= 30
    assert tokens.check(f"Bearer {slow}").name == "slow"


def test_the_file_is_its_owners_alone(file: Path) -> None:
    token = new_token(file, "anna")
    assert file.stat().st_mode & 0o777 == 0o600
    assert token not in file.read_text()
    with pytest.raises(UsageError, match="'anna'"):
        new_token(file, "anna")
    file.chmod(0o640)
    with pytest.raises(UsageError, match="chmod 600"):
        BearerTokens(file)
    file.chmod(0o600)
    for wrong, reason in (
        ("{", "line 1"),
        ("[]", "an object with"),
        ('{"name": "a", "sha256": "b"}', "64 digits"),
        (json.dumps({"name": "a", "sha256": "0" * 64, "expires": "soon"}), "line 1"),
        (json.dumps({"name": "a", "sha256": "0" * 64, "requests_a_minute": -1}), "from 0"),
        (json.dumps({"name": "a", "sha256": "0" * 64, "token": token}), "an object with"),
    ):
        file.write_text(wrong)
        with pytest.raises(UsageError, match=reason) as found:
            BearerTokens(file)
        assert token not in str(found.value)
    with pytest.raises(UsageError, match="cannot read the tokens"):
        BearerTokens(file.with_name("none"))


def test_a_token_is_written_nowhere(
    guarded: tuple[Server, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server, token = guarded
    secret = "a prompt that stays private"
    asked = {"model": "tiny", "prompt": secret, "max_tokens": 3, "seed": 1}
    status, _, body = ask(server, "/v1/completions", token, asked)
    assert status == 200
    ask(server, f"/{token}")
    ask(server, "/v1/completions", token + "y", asked)
    ask(server, "/v1/completions", token, {**asked, "temperature": token})
    _, _, metrics = ask(server, "/metrics", token)
    server.settle()
    processes = subprocess.run(["ps", "-ef"], capture_output=True, text=True, check=True).stdout
    audit = (tmp_path / "audit.jsonl").read_text()
    out, err = capfd.readouterr()
    for text in (metrics, processes, audit, out, err):
        assert token not in text
        assert secret not in text
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600
    lines = [json.loads(line) for line in audit.splitlines()]
    first = lines[0]
    assert first["token"] == "anna"
    assert first["route"] == "/v1/completions"
    assert (first["status"], first["model"]) == (200, "tiny")
    assert first["prompt_tokens"] == body["usage"]["prompt_tokens"] == len(secret)
    assert first["completion_tokens"] == body["usage"]["completion_tokens"]
    assert [line["status"] for line in lines] == [200, 401, 401, 400, 200]
    assert [line["route"] for line in lines][1] == "other"


def test_metrics_count_what_clients_count(guarded: tuple[Server, str]) -> None:
    server, token = guarded
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "seed": 1}
    usages = [ask(server, "/v1/completions", token, asked)[2]["usage"] for _ in range(3)]
    server.settle()
    _, headers, text = ask(server, "/metrics", token)
    assert headers["Content-Type"].startswith("text/plain")
    found = {
        (sample.name, sample.labels.get("route", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    route = "/v1/completions"
    assert found["mpillm_http_requests_total", route] == 3
    assert found["mpillm_http_prompt_tokens_total", route] == 9
    written = sum(usage["completion_tokens"] for usage in usages)
    assert found["mpillm_http_completion_tokens_total", route] == written
    assert found["mpillm_http_first_token_seconds_count", route] == 3
    assert found["mpillm_engine_generated_tokens_total", ""] == written
    assert found["mpillm_engine_failed", ""] == 0
