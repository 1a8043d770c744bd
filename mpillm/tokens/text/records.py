"""Take the text of a JSON record: a field by its name, dots for nesting."""

import json
import re
from collections.abc import Iterator
from typing import Any

from mpillm.errors import UsageError
from mpillm.system.json_text import from_json, to_json
from mpillm.system.messages import command, printable
from mpillm.tokens.text.text_blocks import REPLACEMENT

DEFAULT_FIELD = "text"
MOST_FIELDS_SHOWN = 8
WORDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "list",
    str: "a string",
}
TOO_DEEP = (
    "is nested too deeply to be read, by some thousand levels; "
    "leave the line out or write it flatter"
)
# Half of a character that JSON's \ud83d may name; UTF-8 cannot.
HALF = re.compile("[\ud800-\udfff]")


class RecordError(ValueError):
    """A record without a text: why, and the remedy. The caller puts the record's place first."""


def check_field(name: str) -> None:
    """Raise UsageError for a name that no record can have."""
    if not all(name.split(".")):
        raise UsageError(
            f"--field names a field of the JSON records, dots for nesting; got {name!r}; "
            "write it like text or message.content"
        )


def text_of(line: str, field: str) -> tuple[str, int]:
    """Return the text of the record `line`, and count the halves of characters replaced in it.

    A blank line is an empty text. Raises RecordError.
    """
    if not line.strip():
        return "", 0
    value = parsed(line)
    if not isinstance(value, dict):
        raise RecordError(
            f'has no string field "{field}" (it is {_word(value)}); '
            "write one JSON object a line: `jq -c '.[]' FILE > NEW.jsonl` does so with an array"
        )
    text = field_of(value, field)
    if not isinstance(text, str):
        raise RecordError(_no_text(value, field, text))
    if not HALF.search(text):
        return text, 0
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return whole, whole.count(REPLACEMENT) - text.count(REPLACEMENT)


def object_of(record: Any) -> dict[str, Any]:
    """Return a record that is an object. Raises RecordError for anything else."""
    if not isinstance(record, dict):
        raise RecordError("is no JSON object; write one a line")
    return record


def parsed(line: str) -> Any:
    """Parse a line. Raises RecordError for what is no JSON, and for what is nested too deeply."""
    try:
        try:
            return from_json(line)
        except json.JSONDecodeError:
            raise
        except ValueError as failure:
            if isinstance(failure.__cause__, RecursionError):
                raise RecordError(TOO_DEEP) from failure
        # Python refuses an integer of more than 4,300 digits, which no text is in.
        return json.loads(line, parse_int=lambda digits: 0)
    except json.JSONDecodeError as failure:
        raise RecordError(
            f"isn't JSON: {printable(str(failure))}; write one JSON object a line"
        ) from failure
    except RecursionError as failure:
        raise RecordError(TOO_DEEP) from failure


class _Missing:
    """A field that is not there: null is another thing."""


MISSING = _Missing()


def field_of(record: dict[str, Any], name: str) -> Any:
    """Return the field of that name, `MISSING` without one.

    A name with dots is first taken as it is, then as a way into nested objects.
    """
    if name in record:
        return record[name]
    outer, dot, inner = name.partition(".")
    nested = record.get(outer)
    return field_of(nested, inner) if dot and isinstance(nested, dict) else MISSING


def _no_text(record: dict[str, Any], field: str, value: Any) -> str:
    """Say what the field is instead, which fields hold text, and what to do."""
    strings = [name for name in _strings(record, "") if isinstance(field_of(record, name), str)]
    choice = f", or take another by `{command(['--field', strings[0]])}`" if strings else ""
    if value is MISSING:
        names = ", ".join(sorted(record)[:MOST_FIELDS_SHOWN]) or "nothing"
        more = f"; text is in {', '.join(strings[:MOST_FIELDS_SHOWN])}" if strings else ""
        return (
            f'has no string field "{field}" (it is an object with {names}{more})'
            f"{choice.replace(', or', ';') or '; write one with a text'}"
        )
    leave = command(["jq", "-c", f"select({_jq_path(record, field)}|strings)"])
    return (
        f'has no string field "{field}" ({field} is {_word(value)}); '
        f"leave such records out by `{leave} FILE > NEW.jsonl`{choice}"
    )


def _jq_path(record: dict[str, Any], name: str) -> str:
    """Write the way to a field for jq: `.message.content`, or `.["my-text"]` for odd names."""
    names: list[str] = []
    while name not in record:
        outer, _, name = name.partition(".")
        names.append(outer)
        record = record[outer]
    parts = [
        f".{one}" if one.isascii() and one.isidentifier() else f"[{to_json(one)}]"
        for one in (*names, name)
    ]
    return "".join(parts) if parts[0].startswith(".") else "." + "".join(parts)


def _strings(record: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yield the names of the fields that hold strings, the nested ones after their outer ones."""
    yield from sorted(prefix + key for key, value in record.items() if isinstance(value, str))
    for key, value in sorted(record.items()):
        # Two levels are enough for a hint.
        if isinstance(value, dict) and prefix.count(".") < 2:
            yield from _strings(value, f"{prefix}{key}.")


def _word(value: Any) -> str:
    return WORDS.get(type(value), "an object")
