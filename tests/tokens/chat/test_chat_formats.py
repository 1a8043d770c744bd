"""Formats of conversations: recognised by their columns, and read to messages."""

import json
from typing import Any

import pytest

from mpillm.errors import UsageError
from mpillm.tokens.chat.chat_formats import (
    FORMATS,
    check_format,
    conversation_of,
    recognise,
    words_of,
)
from mpillm.tokens.text.records import RecordError

ANSWER = {"role": "assistant", "content": "b"}
CHAT = [{"role": "user", "content": "a"}, ANSWER]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
CALL = {"name": "f", "arguments": {"x": 1}}
CASES: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": CHAT}, {"conversations": CHAT}],
    "sharegpt": [{"conversations": SHARED}, {"conversation": SHARED}],
    "alpaca": [
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "a", "output": "b"},
        {"instruction": "", "input": "a", "output": "b"},
    ],
    "prompt-completion": [
        {"prompt": "a", "completion": "b"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": SHARED[:1], "completion": SHARED[1:]},
    ],
}


@pytest.mark.parametrize("form", CASES)
def test_each_format_gives_the_same_messages(form: str) -> None:
    for record in CASES[form]:
        assert recognise(record) == form
        assert conversation_of(record, form) == ({"messages": CHAT}, 0)


def test_what_formats_have_beyond_a_turn() -> None:
    def messages(record: dict[str, Any]) -> list[tuple[str, str]]:
        found, _ = conversation_of(record, recognise(record))
        return [(each["role"], each["content"]) for each in found["messages"]]

    whole = {
        "instruction": "c",
        "input": "d",
        "output": "e",
        "system": "s",
        "history": [["a", "b"]],
    }
    expected = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c\nd")]
    assert messages(whole) == [*expected, ("assistant", "e")]
    assert messages({"conversations": SHARED, "system": "s"})[0] == ("system", "s")
    squad = {"context": "c", "question": "q", "answers": {"text": ["b", "x"], "answer_start": [1]}}
    assert messages(squad) == [("user", "c\n\nq"), ("assistant", "b")]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages({"messages": [*CHAT[:1], {**ANSWER, "content": parts}]})[1][1] == "ab"
    assert conversation_of({"text": "a"}, "text") == ({"text": "a"}, 0)
    assert words_of({"text": "a"}) == ["a"]
    assert words_of({"messages": CHAT}) == ["a", "b"]
    assert words_of({"messages": CHAT}, answers=True) == ["b"]


def test_calls_of_tools_become_openais() -> None:
    shared = [SHARED[0], {"from": "function_call", "value": json.dumps(CALL)}]
    shared += [{"from": "observation", "value": "1"}, SHARED[1]]
    record = {"conversations": shared, "tools": json.dumps([{"name": "f"}])}
    found, _ = conversation_of(record, recognise(record))
    assert [each["role"] for each in found["messages"]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert found["messages"][1]["tool_calls"] == [{"type": "function", "function": CALL}]
    assert found["tools"] == [{"name": "f"}]
    shared[1]["value"] = "f(1)"
    with pytest.raises(RecordError, match="has a call of a tool that isn't JSON"):
        conversation_of({"conversations": shared}, "sharegpt")


def test_preferences_are_recognised_before_their_prompts() -> None:
    chosen = {"conversations": SHARED[:1], "chosen": SHARED[1], "rejected": SHARED[1]}
    assert recognise(chosen) == "preference"
    for record in ({"messages": CHAT, "label": True}, {"prompt": "a", "completion": "b"}):
        assert recognise({**record, "label": False}) == "kto"
    with pytest.raises(RecordError, match="pairs of preferences are no chat"):
        conversation_of(chosen, "preference")
    with pytest.raises(RecordError, match="such records are no chat"):
        conversation_of({"messages": CHAT, "label": True}, "kto")


def test_named_columns_are_a_prompt_and_an_answer() -> None:
    record = {"frage": "a", "antwort": {"text": "b"}}
    found = conversation_of(record, "columns", ("frage", "antwort.text"))
    assert found == ({"messages": CHAT}, 0)
    with pytest.raises(RecordError, match=r'no column "q" \(it has frage, antwort\)'):
        conversation_of(record, "columns", ("q", "antwort.text"))
    with pytest.raises(RecordError, match='no text in the column "antwort"'):
        conversation_of(record, "columns", ("frage", "antwort"))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"a": "x", "b": "y"}, r"has the columns a, b, of which no format is known \(preference"),
        ([1], "is no JSON object"),
        ({"prompt": "a"}, "has the columns prompt"),
    ],
)
def test_unknown_columns_are_refused_with_those_found(record: Any, words: str) -> None:
    with pytest.raises(RecordError, match=words):
        recognise(record)


@pytest.mark.parametrize(
    ("form", "record", "words"),
    [
        ("alpaca", {"messages": CHAT}, "is no record of the format alpaca .*: it has the columns"),
        ("alpaca", {"instruction": "a", "output": " "}, "has an empty answer"),
        ("alpaca", {"instruction": "a", "output": 3}, 'has no text in the column "output"'),
        ("messages", {"messages": CHAT[:1]}, "is a conversation without an answer"),
        ("messages", {"messages": [{"role": "x", "content": "a"}]}, "a message of the role 'x'"),
        ("messages", {"messages": [{"role": "user", "content": 3}]}, "user that is no text"),
        ("messages", {"messages": [{"role": "user", "content": [{"image": 1}]}]}, "a picture"),
        ("sharegpt", {"conversations": SHARED, "tools": "{"}, '"tools" that isn\'t JSON'),
        ("prompt-completion", {"prompt": CHAT, "completion": "b"}, "of two forms"),
        ("squad", {"context": "c", "question": "q", "answers": {"text": []}}, "without an answer"),
        ("text", {"text": " "}, "has no text"),
    ],
)
def test_wrong_records_are_refused(form: str, record: dict[str, Any], words: str) -> None:
    with pytest.raises(RecordError, match=words):
        conversation_of(record, form)


def test_halves_of_characters_are_replaced_and_counted() -> None:
    found, halves = conversation_of({"instruction": "a\ud83d", "output": "\udc00b"}, "alpaca")
    assert words_of(found) == ["a\ufffd", "\ufffdb"]
    assert halves == 2


def test_a_format_is_named_by_its_name() -> None:
    check_format("")
    check_format("kto")
    with pytest.raises(
        UsageError, match=rf"--format 'x' is unknown; formats: {', '.join(FORMATS)}"
    ):
        check_format("x")
