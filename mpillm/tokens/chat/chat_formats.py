"""The formats of conversations, each recognised by the columns of a record.

A conversation is a table: `messages` in OpenAI's form, with `tools` where there are any; or `text`.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from mpillm.errors import UsageError
from mpillm.system.json_text import from_json
from mpillm.tokens.text.records import HALF, MISSING, RecordError, field_of, object_of
from mpillm.tokens.text.text_blocks import REPLACEMENT

Record = Mapping[str, Any]
Conversation = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
# Other words for the roles, in data sets that are published.
OTHER_ROLES = MappingProxyType(
    {
        "developer": "system",
        "human": "user",
        "prompter": "user",
        "gpt": "assistant",
        "bot": "assistant",
        "chatgpt": "assistant",
        "model": "assistant",
        "function": "tool",
        "observation": "tool",
        "ipython": "tool",
    }
)
CALL = "function_call"
# Of a message, what templates read.
KEPT = ("tool_calls", "tool_call_id", "name")
MOST_COLUMNS_SHOWN = 12


class ChatFormat(NamedTuple):
    """A format: its columns in words, how it is recognised, and how a record of it is read."""

    columns: str
    knows: Callable[[Record], bool]
    read: Callable[[Record], Conversation]


def recognise(record: Any) -> str:
    """Return the name of the first format that knows the record. Raises RecordError."""
    record = object_of(record)
    for name, form in FORMATS.items():
        if form.knows(record):
            return name
    known = "; ".join(f"{name}: {form.columns}" for name, form in FORMATS.items())
    raise RecordError(
        f"has the columns {columns_of(record)}, of which no format is known ({known}); name its "
        "columns by --source-field and --target-field"
    )


def conversation_of(record: Any, form: str, fields: Sequence[str] = ()) -> tuple[Conversation, int]:
    """Read a record of the format, and count the halves of characters replaced in it.

    `fields`: the columns of a prompt and an answer, where an option names them. Raises RecordError.
    """
    whole, halves = whole_texts(object_of(record))
    if fields:
        found = _turns(_named(whole, fields[0]), _named(whole, fields[1]))
    else:
        if not FORMATS[form].knows(whole):
            raise RecordError(
                f"is no record of the format {form} ({FORMATS[form].columns}): it has the columns "
                f"{columns_of(whole)}; write all records alike, or name another by --format"
            )
        found = FORMATS[form].read(whole)
    check_conversation(found)
    return found, halves


def columns_of(record: Record) -> str:
    """List the columns of a record, for a message."""
    names = list(map(str, record))
    more = " …" if len(names) > MOST_COLUMNS_SHOWN else ""
    return ", ".join(names[:MOST_COLUMNS_SHOWN]) + more if names else "nothing"


def words_of(conversation: Conversation, answers: bool = False) -> list[str]:
    """List the texts of a conversation; `answers`: those of the assistant alone."""
    if "text" in conversation:
        return [conversation["text"]]
    return [
        each["content"]
        for each in conversation["messages"]
        if not answers or each["role"] == "assistant"
    ]


def _named(record: Record, column: str) -> str:
    value = field_of(dict(record), column)
    if not isinstance(value, str):
        what = "no column" if value is MISSING else "no text in the column"
        raise RecordError(
            f'has {what} "{column}" (it has {columns_of(record)}); name another by '
            "--source-field and --target-field"
        )
    return value


def check_conversation(found: Conversation) -> None:
    """Raise RecordError for a conversation without an answer, or with an empty one."""
    if "text" in found:
        if not found["text"].strip():
            raise RecordError("has no text; write one, or leave the record out")
        return
    answers = [each for each in found["messages"] if each["role"] == "assistant"]
    if not answers:
        raise RecordError(
            "is a conversation without an answer of the assistant; leave the record out"
        )
    for each in answers:
        if not each["content"].strip() and not each.get("tool_calls"):
            raise RecordError("has an empty answer; write one, or leave the record out")


def whole_texts(value: Any) -> tuple[Any, int]:
    """Replace halves of characters, which cannot be encoded, at any depth."""
    if isinstance(value, str):
        return HALF.subn(REPLACEMENT, value)
    if isinstance(value, list):
        parts = [whole_texts(each) for each in value]
        return [part for part, _ in parts], sum(count for _, count in parts)
    if isinstance(value, dict):
        pairs = {key: whole_texts(each) for key, each in value.items()}
        return {k: part for k, (part, _) in pairs.items()}, sum(n for _, n in pairs.values())
    return value, 0


def message(role: Any, content: Any, other: Record = MappingProxyType({})) -> Conversation:
    """Make a message. Raises RecordError for an unknown role, and for what is no text."""
    name = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if name not in ROLES:
        raise RecordError(f"has a message of the role {role!r}; roles: {', '.join(ROLES)}")
    if isinstance(content, list):
        content = "".join(_part(each) for each in content)
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise RecordError(f"has a message of the {name} that is no text")
    kept = {key: other[key] for key in KEPT if other.get(key)}
    return {"role": name, "content": content, **kept}


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RecordError("has a message with a part that is no text, such as a picture")


def _text(record: Record, column: str) -> str:
    value = record.get(column)
    if not isinstance(value, str):
        raise RecordError(f'has no text in the column "{column}"')
    return value


def system_of(record: Record) -> list[Conversation]:
    text = record.get("system")
    return [message("system", text)] if isinstance(text, str) and text else []


def _turns(prompt: str, answer: str) -> Conversation:
    return {"messages": [message("user", prompt), message("assistant", answer)]}


def _is_list(value: Any, *keys: str) -> bool:
    """Return whether a value is a list of objects that have all keys."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and all(key in each for key in keys) for each in value)
    )


def with_tools(record: Record, messages: list[Conversation]) -> Conversation:
    """Add the tools that may be called: a list, or its JSON in a text."""
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = from_json(tools)
        except ValueError as failure:
            raise RecordError(f'has a column "tools" that isn\'t JSON: {failure}') from failure
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _of_openai(value: list[Any]) -> list[Conversation]:
    return [message(each["role"], each.get("content"), each) for each in value]


def _of_sharegpt(value: list[Any]) -> list[Conversation]:
    return [
        _call(each["value"]) if each["from"] == CALL else message(each["from"], each["value"])
        for each in value
    ]


def _call(text: Any) -> Conversation:
    """Make the message of a call, or of several, that is written as JSON."""
    try:
        found = from_json(text)
        calls = found if isinstance(found, list) else [found]
        functions = [{"name": each["name"], "arguments": each["arguments"]} for each in calls]
    except (ValueError, TypeError, KeyError) as failure:
        raise RecordError(
            f"has a call of a tool that isn't JSON with name and arguments: {failure}"
        ) from failure
    listed = [{"type": "function", "function": each} for each in functions]
    return message("assistant", "", {"tool_calls": listed})


def messages_of(value: Any) -> list[Conversation] | None:
    """Read messages of either form; None for anything else."""
    if _is_list(value, "role"):
        return _of_openai(value)
    return _of_sharegpt(value) if _is_list(value, "from", "value") else None


def _read_messages(record: Record) -> Conversation:
    column = next(name for name in MESSAGE_COLUMNS if _is_list(record.get(name), "role"))
    return with_tools(record, [*system_of(record), *_of_openai(record[column])])


def _read_sharegpt(record: Record) -> Conversation:
    column = next(name for name in MESSAGE_COLUMNS if _is_list(record.get(name), "from", "value"))
    return with_tools(record, [*system_of(record), *_of_sharegpt(record[column])])


def _read_alpaca(record: Record) -> Conversation:
    messages = system_of(record)
    for asked, answered in record.get("history") or ():
        messages += _turns(asked, answered)["messages"]
    given = record.get("input")
    prompt = _text(record, "instruction")
    if isinstance(given, str) and given:
        prompt = f"{prompt}\n{given}" if prompt else given
    return with_tools(record, messages + _turns(prompt, _text(record, "output"))["messages"])


def _read_prompt(record: Record) -> Conversation:
    if isinstance(record["prompt"], str):
        turns = _turns(record["prompt"], _text(record, "completion"))["messages"]
        return with_tools(record, [*system_of(record), *turns])
    parts = [messages_of(record[name]) for name in ("prompt", "completion")]
    if None in parts:
        raise RecordError("has a prompt and a completion of two forms; write both alike")
    return with_tools(record, [each for part in parts for each in part or ()])


def _read_squad(record: Record) -> Conversation:
    answers = record["answers"]["text"]
    if not answers:
        raise RecordError("is a question without an answer; leave the record out")
    return _turns(f"{_text(record, 'context')}\n\n{_text(record, 'question')}", answers[0])


def _refuse_preference(record: Record) -> Conversation:
    raise RecordError(
        "holds a chosen and a rejected answer: pairs of preferences are no chat; "
        "prepare them by --task preference"
    )


def _refuse_kto(record: Record) -> Conversation:
    raise RecordError(
        "holds an answer with a label, of KTO: such records are no chat; prepare them by --task "
        "preference"
    )


MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
FORMATS: Mapping[str, ChatFormat] = MappingProxyType(
    {
        # The first ones hold columns of the others, too.
        "preference": ChatFormat(
            "prompt or conversations, chosen, rejected",
            lambda r: "chosen" in r and "rejected" in r,
            _refuse_preference,
        ),
        "kto": ChatFormat(
            "prompt and completion, or messages, with label true or false",
            lambda r: (
                isinstance(r.get("label"), bool)
                and ("completion" in r or any(name in r for name in MESSAGE_COLUMNS))
            ),
            _refuse_kto,
        ),
        "squad": ChatFormat(
            "context, question, answers",
            lambda r: (
                {"context", "question"} <= r.keys()
                and isinstance(r.get("answers"), dict)
                and isinstance(r["answers"].get("text"), list)
            ),
            _read_squad,
        ),
        "messages": ChatFormat(
            "messages with role and content",
            lambda r: any(_is_list(r.get(name), "role") for name in MESSAGE_COLUMNS),
            _read_messages,
        ),
        "sharegpt": ChatFormat(
            "conversations with from and value",
            lambda r: any(_is_list(r.get(name), "from", "value") for name in MESSAGE_COLUMNS),
            _read_sharegpt,
        ),
        "alpaca": ChatFormat(
            "instruction, input, output",
            lambda r: {"instruction", "output"} <= r.keys(),
            _read_alpaca,
        ),
        "prompt-completion": ChatFormat(
            "prompt, completion", lambda r: {"prompt", "completion"} <= r.keys(), _read_prompt
        ),
        "text": ChatFormat(
            "text", lambda r: isinstance(r.get("text"), str), lambda r: {"text": r["text"]}
        ),
    }
)


def check_format(name: str) -> None:
    """Raise UsageError for a name that is no format."""
    if name and name not in FORMATS:
        raise UsageError(f"--format {name!r} is unknown; formats: {', '.join(FORMATS)}")
