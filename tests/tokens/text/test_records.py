"""The text of JSON records: fields by name, what is no text, and what a parser chokes on."""

import json
import shutil
import subprocess

import pytest
from mpi4py import MPI

from mpillm.errors import UsageError
from mpillm.tokens.text.records import RecordError, check_field, text_of

pytestmark = pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="no messages: serial pass only")

RECORD = {"text": "t", "a": {"b": {"c": "deep"}, "b.c": "dots"}, "x.y": "plain", "n": 1, "z": None}


@pytest.mark.parametrize(("field", "text"), [("text", "t"), ("a.b.c", "dots"), ("x.y", "plain")])
def test_a_field_by_its_name(field: str, text: str) -> None:
    assert text_of(json.dumps(RECORD), field) == (text, 0)
    check_field(field)


def test_dots_lead_into_nested_objects() -> None:
    assert text_of('{"message": {"content": "hi"}}', "message.content") == ("hi", 0)


@pytest.mark.parametrize("name", ["", ".", "a.", ".a", "a..b"])
def test_a_name_that_no_field_has(name: str) -> None:
    with pytest.raises(UsageError, match="--field names a field"):
        check_field(name)


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("n", r"\(n is a number\); leave such records out by `jq -c 'select\(\.n\|strings\)' FILE"),
        ("z", r"\(z is null\).*, or take another by `--field text`"),
        ("a", r"\(a is an object\)"),
        ("body", r"\(it is an object with a, n, text, x\.y, z; text is in text, x\.y, "),
        ("text.more", r'has no string field "text\.more"'),
        ("a.q", r'has no string field "a\.q"'),
    ],
)
def test_what_is_no_text_is_named(field: str, says: str) -> None:
    with pytest.raises(RecordError, match=says):
        text_of(json.dumps(RECORD), field)


@pytest.mark.parametrize(
    ("field", "query"),
    [
        ("my-text", '.["my-text"]'),
        ("a.b c", '.a["b c"]'),
        ("x.y", '.["x.y"]'),
        ("a.d.e", ".a.d.e"),
        ("1.end", '.["1"].end'),
    ],
)
def test_the_filter_of_jq_takes_any_name(field: str, query: str) -> None:
    record = {"my-text": 1, "x.y": 1, "a": {"b c": 1, "d": {"e": 1}}, "1": {"end": 1}}
    with pytest.raises(RecordError) as raised:
        text_of(json.dumps(record), field)
    assert f"jq -c 'select({query}|strings)' FILE" in str(raised.value)
    if shutil.which("jq"):
        ran = subprocess.run(
            ["jq", "-c", f"select({query}|numbers)"],
            input=json.dumps(record),
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(ran.stdout) == record


def test_what_is_no_json_next_to_a_huge_number() -> None:
    """The second parse, without the number, fails as the first one."""
    with pytest.raises(RecordError, match="isn't JSON: Expecting value"):
        text_of(f'{{"n": {"1" * 5000}, "text": }}', "text")
    with pytest.raises(RecordError, match="is nested too deeply"):
        text_of(f'{{"n": {"1" * 5000}, "text": {"[" * 200_000}', "text")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("[1]", "a list|list"),
        ("null", "null"),
        ("3", "a number"),
        ("true", "true or false"),
        ('"x"', "a string"),
        ("{}", "an object with nothing"),
        ('{"text": ["a"]}', "text is list"),
        ('{"text": true}', "text is true or false"),
    ],
)
def test_what_a_record_is_instead(line: str, what: str) -> None:
    with pytest.raises(RecordError, match=what):
        text_of(line, "text")


def test_numbers_that_python_refuses_are_read_over() -> None:
    digits = "9" * 5000
    assert text_of(f'{{"text": "t", "n": {digits}, "m": -{digits}}}', "text") == ("t", 0)
    with pytest.raises(RecordError, match="text is a number"):
        text_of(f'{{"text": {digits}}}', "text")


@pytest.mark.parametrize("digits", ["", "9" * 5000 + ","])
def test_deep_nesting_is_no_bare_error(digits: str) -> None:
    deep = '{"text": "t", "d": [' + digits + "[" * 100_000 + "]" * 100_000 + "]}"
    with pytest.raises(RecordError, match=r"nested too deeply .*; leave the line out"):
        text_of(deep, "text")


def test_halves_of_characters_are_replaced_and_counted() -> None:
    line = r'{"text": "\ud83d \ude00\ud83d \ud83d\ude00 \ufffd"}'
    assert text_of(line, "text") == ("\ufffd \ufffd\ufffd 😀 \ufffd", 3)
    assert text_of(" \n", "text") == ("", 0)
