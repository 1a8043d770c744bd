"""The chat page in a browser: keyboard, streaming, stop, a token, and no network but its own."""

import html.parser
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mpillm.infer.serve.http.bearer_tokens import new_token
from mpillm.infer.serve.http.chat_page import ChatPage
from mpillm.infer.serve.http.listening import ListeningOptions
from tests.fixtures.browser import Browser, open_browser
from tests.infer.serve.http.served import serving, tiny_model

pytestmark = pytest.mark.usefixtures("processes")
EVIL = "<script>alert(1)</script>\"'{{ 7*7 }}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def press(browser: Browser, key: str, text: str = "", modifiers: int = 0) -> None:
    asked = {"key": key, "code": key, "modifiers": modifiers}
    codes = {"Enter": 13, "Escape": 27, "Tab": 9}
    asked["windowsVirtualKeyCode"] = codes[key]
    browser.ask("Input.dispatchKeyEvent", type="keyDown", text=text, **asked)
    browser.ask("Input.dispatchKeyEvent", type="keyUp", **asked)


def settle(browser: Browser, tokens: int) -> None:
    """Ask for short answers that are always the same: one by chance may be empty."""
    browser.evaluate(f"document.getElementById('most').value = {tokens}")
    browser.evaluate("document.getElementById('temperature').value = 0")


def words(browser: Browser, what: str) -> list[str]:
    found: list[str] = browser.evaluate(
        f"[...document.querySelectorAll({json.dumps(what)})].map(each => each.textContent)"
    )
    return found


def test_every_field_has_a_label_and_nothing_comes_from_elsewhere() -> None:
    page = ChatPage(EVIL, True, True)
    labels: set[str] = set()
    fields: list[dict[str, Any]] = []

    class Reader(html.parser.HTMLParser):
        inside = 0

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            values = dict(attrs)
            assert "style" not in values
            assert not any(name.startswith("on") for name in values)
            if tag == "label":
                self.inside += 1
                labels.add(str(values.get("for")))
            if tag in ("input", "textarea"):
                fields.append({**values, "inside": self.inside})
            assert tag not in ("iframe", "img", "object", "base")
            assert tag != "script" or "src" not in values

        def handle_endtag(self, tag: str) -> None:
            self.inside -= tag == "label"

    Reader().feed(page.text)
    assert len(fields) == 5
    assert all(field["inside"] or field["id"] in labels for field in fields)
    assert "<script>alert" not in page.text
    assert "{{" not in page.text.replace("{{ 7*7 }}", "")
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert re.findall(r"https?://", page.text) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_conversation_by_keyboard(browser: Browser, dark: bool) -> None:
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.ask("Emulation.setEmulatedMedia", features=scheme)
    model = tiny_model(context=600)
    with serving(model) as server:
        browser.open(server.url + "/")
        assert browser.evaluate("document.activeElement.id") == "text"
        paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(22, 24, 27)" if dark else "rgb(255, 255, 255)")
        settle(browser, 20)
        browser.ask("Input.insertText", text=EVIL)
        press(browser, "Enter", "\r", modifiers=8)
        browser.ask("Input.insertText", text="second line")
        press(browser, "Enter", "\r")
        until(lambda: words(browser, "#status") == ["The answer is complete."])
        assert words(browser, "article.user p") == [f"{EVIL}\nsecond line"]
        [answer] = words(browser, "article.assistant p")
        assert answer
        assert browser.evaluate("document.activeElement.id") == "text"
        # The second turn holds the first one, and Escape stops its answer.
        server.engine.hold.clear()
        browser.ask("Input.insertText", text="again")
        press(browser, "Enter", "\r")
        until(lambda: bool(server.engine.counts().running))
        [job] = server.engine._open.values()
        assert answer in model.text_of(job.request.prompt)
        press(browser, "Escape")
        until(job.cancelled.is_set)
        server.engine.hold.set()
        until(lambda: browser.evaluate("document.getElementById('stop').disabled"))
        assert words(browser, ".fault") == []
        # The button is reached by keys alone.
        browser.evaluate("document.getElementById('new').focus(), 0")
        press(browser, "Enter", "\r")
        until(lambda: words(browser, "article") == [])
        # A narrow screen scrolls in one direction.
        size = {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": False}
        browser.ask("Emulation.setDeviceMetricsOverride", **size)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 360
        asked = [each["request"]["url"] for each in browser.named("Network.requestWillBeSent")]
        assert all(url.startswith((server.url, "data:")) for url in asked)
        logged = browser.named("Log.entryAdded", "Runtime.consoleAPICalled")
        assert logged + browser.named("Runtime.exceptionThrown") == []


def test_a_token_and_a_model_without_a_template(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    token = new_token(file, "anna")
    with serving(tiny_model(chats=False), ListeningOptions(port=0, tokens=file)) as server:
        browser.open(server.url + "/")
        settle(browser, 5)
        browser.ask("Input.insertText", text="once upon")
        press(browser, "Enter", "\r")
        until(lambda: words(browser, ".fault"))
        assert "bearer token is missing" in words(browser, ".fault")[0]
        browser.evaluate(f"document.getElementById('token').value = {json.dumps(token)}")
        browser.ask("Input.insertText", text="once upon")
        press(browser, "Enter", "\r")
        until(lambda: words(browser, "article.assistant p"))
        until(lambda: words(browser, "#status") == ["The answer is complete."])
        assert words(browser, "article.assistant p")[0]
