"""The fields of a request's body, each read by its type. A wrong one is named.

A field that is null counts as left out, as OpenAI's API does it.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from mpillm.infer.serve.http.forms.api_error import ApiError, wrong_field
from mpillm.system.json_text import from_json

MOST_NAMES_SHOWN = 5


def parse_body(content: bytes) -> "BodyFields":
    """Parse a body. Raises ApiError where it is no JSON object in UTF-8."""
    try:
        value = from_json(content.decode("utf-8"))
    except UnicodeDecodeError as failure:
        raise ApiError(400, f"the body is not UTF-8: byte {failure.start:,} of it") from None
    except ValueError as failure:
        raise ApiError(400, f"the body is not JSON: {failure}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {kind_of(value)}; send a JSON object")
    return BodyFields(value)


class BodyFields:
    """A JSON object, and which of its fields were read."""

    def __init__(self, values: Mapping[str, Any], place: str = "") -> None:
        """`place`: the name of the object itself, for messages: `stream_options.`."""
        self._values = {name: value for name, value in values.items() if value is not None}
        self._place = place
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def value(self, name: str) -> Any:
        """Return a field as it is; None without."""
        self._read.add(name)
        return self._values.get(name)

    def text(self, name: str, default: str = "") -> str:
        """Read a text."""
        value = self.value(name)
        if value is None:
            return default
        return check_text(self._place + name, value)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """Read a whole number from `low` to `high`."""
        value = self.value(name)
        if value is None:
            return default
        return check_integer(self._place + name, value, low, high)

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """Read a number from `low` to `high`."""
        value = self.value(name)
        if value is None:
            return default
        return check_number(self._place + name, value, low, high)

    def flag(self, name: str, default: bool = False) -> bool:
        """Read true or false."""
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong_type(self._place + name, "true or false", value)
        return value

    def choice(self, name: str, known: Iterable[str], default: str) -> str:
        """Read one of the texts `known`."""
        value = self.text(name, default)
        if value not in known:
            words = ", ".join(known)
            raise wrong_field(self._place + name, f"is one of {words}, and not {shown(value)}")
        return value

    def table(self, name: str) -> "BodyFields | None":
        """Read an object; None without."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise wrong_type(self._place + name, "an object", value)
        return BodyFields(value, f"{self._place}{name}.")

    def list(self, name: str) -> list[Any] | None:
        """Read a list; None without."""
        value = self.value(name)
        if value is not None and not isinstance(value, list):
            raise wrong_type(self._place + name, "a list", value)
        return value

    def refuse_others(self, ignored: Iterable[str] = ()) -> None:
        """Raise ApiError for a field that was not read and is not `ignored`."""
        left = sorted(self._values.keys() - self._read - set(ignored))
        if left:
            names = ", ".join(map(shown, left[:MOST_NAMES_SHOWN]))
            raise ApiError(400, f"unknown fields: {self._place}{names}", left[0][:100])


def check_text(name: str, value: Any) -> str:
    """Return a text. Raises ApiError for anything else, and for halves of characters."""
    if not isinstance(value, str):
        raise wrong_type(name, "a text", value)
    try:
        value.encode()
    except UnicodeEncodeError as failure:
        place = f"character {failure.start:,}"
        raise wrong_field(name, f"holds half of a surrogate pair, {place}; escape both") from None
    return value


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number. Raises ApiError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong_type(name, "a whole number", value)
    if not low <= value <= high:
        raise wrong_field(name, f"is a number from {low:,} to {high:,}, and not {shown(value)}")
    return value


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """Return a number. Raises ApiError for anything else, NaN included."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise wrong_type(name, "a number", value)
    # A whole number of thousands of digits is no float.
    if not low <= value <= high or (isinstance(value, float) and not math.isfinite(value)):
        raise wrong_field(name, f"is a number from {low:g} to {high:g}, and not {shown(value)}")
    return float(value)


def wrong_type(name: str, wanted: str, value: Any) -> ApiError:
    """Make the error of a field of another type."""
    return wrong_field(name, f"takes {wanted}, and not {kind_of(value)}", "invalid_type")


def kind_of(value: Any) -> str:
    """Name the JSON type of a value."""
    kinds: list[tuple[type, str]] = [
        (bool, "true or false"),
        (int, "a whole number"),
        (float, "a number"),
        (str, "a text"),
        (list, "a list"),
        (dict, "an object"),
    ]
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def shown(value: Any) -> str:
    """Write a value of a client for a message, shortened."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length():,} bits"
    return reprlib.repr(value)
