"""Filters of generated texts, by the rules of lm-eval 0.4.13 (lm_eval/filters)."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from mpillm.errors import UsageError

# The keys of each filter, with their defaults.
FILTERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "regex": {
            "regex_pattern": r"#### (\-?[0-9\.\,]+)",
            "group_select": 0,
            "fallback": "[invalid]",
        },
        "remove_whitespace": {},
        "lowercase": {},
        "uppercase": {},
        "take_first": {},
    }
)
PLAIN: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "remove_whitespace": str.strip,
        "lowercase": str.lower,
        "uppercase": str.upper,
        "take_first": str,
    }
)


@dataclass(frozen=True)
class RegexFilter:
    """Take a match out of a text, or a fallback where there is none."""

    pattern: "re.Pattern[str]"
    select: int
    fallback: str

    def __call__(self, text: str) -> str:
        found = self.pattern.findall(text)
        if not found:
            return self.fallback
        try:
            match = found[self.select]
        except IndexError as failure:
            raise UsageError(
                f"the filter regex selects match {self.select} of {self.pattern.pattern!r}, and "
                f"the text {text!r:.80} has {len(found)}; lower group_select"
            ) from failure
        if isinstance(match, tuple):
            match = next((group for group in match if group), self.fallback)
        return str(match).strip()


@dataclass(frozen=True)
class ResponseFilter:
    """A pipeline of filters under its name in tables."""

    name: str = "none"
    steps: tuple[Callable[[str], str], ...] = ()

    def __call__(self, text: str) -> str:
        for step in self.steps:
            text = step(text)
        return text


def read_filters(listed: Any, output_type: str, place: str) -> tuple[ResponseFilter, ...]:
    """Read the key filter_list. Raises UsageError for a filter that is not supported.

    Without the key there is one pipeline of the name none, which changes nothing.
    """
    if listed is None:
        return (ResponseFilter(),)
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"{place}: filter_list must be a list of filters, and not {listed!r:.80}")
    return tuple(_pipeline(each, output_type, place) for each in listed)


def _pipeline(entry: Any, output_type: str, place: str) -> ResponseFilter:
    if not isinstance(entry, dict) or {*entry} != {"name", "filter"}:
        raise UsageError(
            f"{place}: an entry of filter_list has the keys name and filter, and not {entry!r:.80}"
        )
    functions = entry["filter"]
    if not isinstance(functions, list) or not all(isinstance(each, dict) for each in functions):
        raise UsageError(f"{place}: filter must be a list of functions, and not {functions!r:.80}")
    names = [each.get("function") for each in functions]
    if "take_first" in names[:-1]:
        # The harness would then filter the letters of the text, one by one.
        raise UsageError(f"{place}: the filter take_first must be the last; move it to the end")
    return ResponseFilter(
        str(entry["name"]), tuple(_step(each, output_type, place) for each in functions)
    )


def _step(given: Mapping[str, Any], output_type: str, place: str) -> Callable[[str], str]:
    name = str(given.get("function"))
    if name not in FILTERS:
        raise UsageError(
            f"{place}: the filter {name!r} is not supported; take one of {', '.join(FILTERS)}, or "
            "let lm-eval itself drive the model: `mpillm lm-eval --help`"
        )
    if name != "take_first" and output_type != "generate_until":
        raise UsageError(
            f"{place}: the filter {name} reads texts, and output_type {output_type} gives none; "
            "leave it out"
        )
    known = FILTERS[name]
    for key in given:
        if key not in {"function", *known}:
            raise UsageError(
                f"{place}: the filter {name} has no key {key}; it has {', '.join(known) or 'none'}"
            )
    if name != "regex":
        return PLAIN[name]
    values = {**known, **given}
    try:
        pattern = re.compile(values["regex_pattern"])
        return RegexFilter(pattern, int(values["group_select"]), str(values["fallback"]))
    except (re.error, TypeError, ValueError) as failure:
        raise UsageError(
            f"{place}: the filter regex cannot be read: {failure}; correct regex_pattern "
            f"{values['regex_pattern']!r:.80}"
        ) from failure
