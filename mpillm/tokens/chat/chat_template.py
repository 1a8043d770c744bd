"""Write a conversation as text by the Jinja template of a tokenizer, in a sandbox.

A template is code of others. The sandbox gives it no attribute of Python's own and changes nothing.
It has the functions that transformers gives to templates, so that both write the same text.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mpillm.errors import UsageError
from mpillm.system.json_text import from_json
from mpillm.system.messages import explain, printable
from mpillm.system.plain_files import read_plain
from mpillm.tokens.text.records import RecordError

TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
# Files of a folder that name its special tokens, the last one first.
NAMING = ("special_tokens_map.json", CONFIG)
# The date in prompts: a dataset that is prepared on two days has the same bytes. It is the one
# that Llama's own templates write where there is no clock.
DATE = datetime(2024, 7, 26, tzinfo=UTC)
LONGEST_TEMPLATE = 1 << 20
Message = Mapping[str, Any]


class _Generation(Extension):
    """The block {% generation %} of transformers: it marks an answer, and writes what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Names(Namespace):
    """The object `namespace(…)` of Jinja, without names of Python's own."""

    def __init__(*args: Any, **named: Any) -> None:
        # As Jinja's: a template may name a value `self`.
        own, *pairs = args
        values = dict(*pairs, **named)
        super(_Names, own).__init__()
        for name, value in values.items():
            own[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"the name {name!r} is not a template's to set")
        super().__setitem__(name, value)


class ChatTemplate:
    """A template with the special tokens that it may write, such as `bos_token`."""

    def __init__(self, text: str, tokens: Mapping[str, str], place: str = "") -> None:
        """Parse the template. `place` is for messages. Raises UsageError where it is none."""
        self.text, self.tokens, self.place = text, dict(tokens), place or "the chat template"
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateError as failure:
            raise UsageError(
                f"{self.place} is no chat template: {printable(str(failure))}; "
                "give another by --chat-template FILE"
            ) from failure

    def __reduce__(self) -> tuple[Any, ...]:
        # What is compiled cannot be sent to another rank.
        return ChatTemplate, (self.text, self.tokens, self.place)

    @cached_property
    def knows_calls(self) -> bool:
        """Whether it writes calls of tools in a form of its own."""
        return "tool_calls" in self.text

    @cached_property
    def knows_tools(self) -> bool:
        """Whether it writes the tools that may be called."""
        return "tools" in self.text.replace("tool_calls", "")

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        prompt: bool = False,
    ) -> str:
        """Write the messages; with `prompt`, and the beginning of an answer.

        Raises RecordError where the template refuses them.
        """
        given = {"messages": list(messages), "tools": tools or None, "documents": None}
        try:
            return self._template.render(**given, add_generation_prompt=prompt, **self.tokens)
        except jinja2.TemplateError as failure:
            reason = printable(str(failure))
        # A template computes with what a record holds, and may fail in any way.
        except (TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as failure:
            reason = f"{type(failure).__name__}: {printable(str(failure))}"
        raise RecordError(
            f"is refused by {self.place}: {reason}; "
            "leave the record out, or give another by --chat-template FILE"
        )


def _environment() -> jinja2.Environment:
    """Make the environment that transformers renders in."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes the letters of HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: DATE.strftime(form)
    environment.globals["namespace"] = _Names
    # A function: the class itself would give its own methods.
    environment.globals["dict"] = lambda *pairs, **named: dict(*pairs, **named)
    return environment


def find_template(
    folder: Path | None, named: Path | None, texts_of: Mapping[int, str], end_of_text: str
) -> ChatTemplate | None:
    """Read the template in the file `named`, else that of the tokenizer's folder; None without.

    `texts_of`: the tokenizer's added tokens by id. Raises UsageError.
    """
    tokens = _special_tokens(folder, texts_of, end_of_text)
    if named is not None:
        return ChatTemplate(_read(named), tokens, str(named))
    if folder is None:
        return None
    if (folder / TEMPLATE).is_file():
        return ChatTemplate(_read(folder / TEMPLATE), tokens, str(folder / TEMPLATE))
    found = _config(folder / CONFIG).get("chat_template")
    if isinstance(found, list):
        named_texts = {each.get("name"): each.get("template") for each in found}
        found = named_texts.get("default")
    if not isinstance(found, str):
        return None
    return ChatTemplate(found, tokens, f"the chat_template of {folder / CONFIG}")


def _special_tokens(
    folder: Path | None, texts_of: Mapping[int, str], end_of_text: str
) -> dict[str, str]:
    """Collect the texts of `bos_token`, `eos_token` and others, as the folder names them."""
    found = {"eos_token": end_of_text}
    if folder is None:
        return found
    # A model that was imported from a GGUF file has their ids alone.
    for key, number in _config(folder / "config.json").items():
        name = key.removesuffix("_id")
        if name.endswith("_token") and isinstance(number, int) and number in texts_of:
            found[name] = texts_of[number]
    for file in NAMING:
        for name, value in _config(folder / file).items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                found[name] = text
    return found


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = from_json(_read(path))
    except ValueError as failure:
        raise UsageError(f"cannot read {path}: {failure}; copy it again") from failure
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> str:
    try:
        return read_plain(path, most=LONGEST_TEMPLATE).decode()
    except OSError as failure:
        raise UsageError(f"cannot read {explain(failure, path)}") from failure
    except UnicodeDecodeError as failure:
        raise UsageError(f"{path} is no UTF-8 text; save it as one") from failure
