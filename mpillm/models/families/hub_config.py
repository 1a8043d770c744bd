"""A Hugging Face `config.json`: values with the defaults of its family, checked one by one."""

from collections.abc import Mapping
from typing import Any

from mpillm.errors import RecipeError

SCALING_KEYS = ("rope_scaling", "rope_parameters")
# A file may name any number, and each layer and expert of it becomes names of weights.
MOST_LAYERS, MOST_EXPERTS, LARGEST, LARGEST_NUMBER = 4096, 4096, 2**31 - 1, 1e30
KINDS = ("full_attention", "sliding_attention")


class HubConfig:
    """The settings in a `config.json`. A file lists only those that differ from `defaults`."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._given, self._defaults = given, defaults
        self.model_type = str(given.get("model_type"))

    def has(self, key: str) -> bool:
        """Return whether the file has `key` itself."""
        return key in self._given

    def value(self, key: str) -> Any:
        """Return the value of `key`, or its default; None is a value."""
        return self._given[key] if key in self._given else self._defaults.get(key)

    def integer(self, key: str, least: int = 1, most: int = LARGEST) -> int:
        """Return a whole number from `least` to `most`. Raises RecipeError for anything else."""
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.fault(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str) -> float:
        """Return a number above 0. Raises RecipeError for anything else."""
        return self.positive(key, self.value(key))

    def positive(self, key: str, value: Any) -> float:
        """Check that `value`, which `key` has, is a number above 0. Raises RecipeError."""
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not 0 < value < LARGEST_NUMBER:
            raise self.fault(key, value, "a number above 0")
        return float(value)

    def share(self, key: str) -> float:
        """Return a probability from 0 on, below 1. Raises RecipeError for anything else."""
        value = self.value(key) or 0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise self.fault(key, value, "a number from 0 on, below 1")
        return float(value)

    def require(self, key: str, *supported: Any) -> Any:
        """Return the value of `key`. Raises RecipeError where it is not one of `supported`."""
        value = self.value(key)
        if value not in supported:
            raise self.fault(key, value, " or ".join(_shown(each) for each in supported))
        # Not the value itself: 0 equals false.
        return supported[supported.index(value)]

    def fault(self, key: str, value: Any, supported: str) -> RecipeError:
        """Return the error for a value that this family does not support."""
        return RecipeError(
            f"config.json of {self.model_type}: {key} = {_shown(value)} is not supported; "
            f"mpillm reads {supported}"
        )

    def rope(self, kind: str = "full_attention", key: str = "rope_theta") -> dict[str, Any]:
        """Return `rope_theta`, `rope_type` and the values of a scaling, of one kind of layer.

        transformers 4 has `rope_theta` next to `rope_scaling`, transformers 5 has all in
        `rope_parameters`, which may have one mapping a kind of layer. `key`: of transformers 4, for
        this kind; a scaling next to it is that of `full_attention`.
        """
        found: dict[str, Any] = {}
        for place in SCALING_KEYS:
            given = self.value(place) or {}
            if not isinstance(given, Mapping):
                raise self.fault(place, given, "a mapping")
            nested = given.get(kind)
            if isinstance(nested, Mapping):
                found.update(nested)
            elif kind == "full_attention":
                found.update({name: each for name, each in given.items() if name not in KINDS})
        theta = found.get("rope_theta") or self.value(key)
        found["rope_theta"] = self.positive(key, theta)
        found["rope_type"] = found.get("rope_type") or found.pop("type", None) or "default"
        return found


def _shown(value: Any) -> str:
    """Write a value as JSON does, at most 60 characters of it."""
    names = {True: "true", False: "false", None: "null"}
    if value is None or isinstance(value, bool):
        return names[value]
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
