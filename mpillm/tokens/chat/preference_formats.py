"""Records of preferences: pairs of a chosen and a rejected answer, or answers with a label (KTO).

Each answer is a conversation of its own, with the prompt; only the answer is learnt from.
"""

from typing import Any, NamedTuple

from mpillm.tokens.chat.chat_formats import (
    MESSAGE_COLUMNS,
    Conversation,
    Record,
    check_conversation,
    columns_of,
    message,
    messages_of,
    system_of,
    whole_texts,
    with_tools,
)
from mpillm.tokens.text.records import RecordError, object_of

PAIRS, LABELLED = "preference", "kto"
COLUMNS = {
    PAIRS: "prompt, conversations or instruction, with chosen and rejected",
    LABELLED: "prompt and completion, or messages, with label or kto_tag true or false",
}
SIDES = ("chosen", "rejected")
LABEL_COLUMNS = ("label", "kto_tag")
# What tables without types write.
LABELS = {"true": True, "false": False, "1": True, "0": False}
LEARNT_ANSWERS = "learnt_answers"
"""The key of a conversation that says how many of its last answers are learnt from."""


class Preference(NamedTuple):
    """What a record says: a chosen conversation and a rejected one, or one that is either."""

    chosen: Conversation | None
    rejected: Conversation | None
    halves: int = 0
    """The halves of characters that were replaced."""


def recognise_preference(record: Any) -> str:
    """Return the format of a record of preferences. Raises RecordError with the columns found."""
    record = object_of(record)
    for form in (PAIRS, LABELLED):
        if _knows(record, form):
            return form
    known = "; ".join(f"{name}: {columns}" for name, columns in COLUMNS.items())
    raise RecordError(
        f"has the columns {columns_of(record)}, which no format of preferences has ({known}); "
        "rename the columns"
    )


def preference_of(record: Any, form: str) -> Preference:
    """Read a record of the format. Raises RecordError."""
    whole, halves = whole_texts(object_of(record))
    if not _knows(whole, form):
        raise RecordError(
            f"is no record of the format {form} ({COLUMNS[form]}): it has the columns "
            f"{columns_of(whole)}; write all records alike, or name another by --format"
        )
    if form == PAIRS:
        return Preference(*_pair(whole), halves)
    answered, desired = _labelled(whole), _label(whole)
    return Preference(answered if desired else None, None if desired else answered, halves)


def _knows(record: Record, form: str) -> bool:
    if form == PAIRS:
        return all(side in record for side in SIDES)
    answers = "completion" in record or any(name in record for name in MESSAGE_COLUMNS)
    return answers and any(name in record for name in LABEL_COLUMNS)


def _pair(record: Record) -> tuple[Conversation, Conversation]:
    chosen, rejected = (_answer(record, side) for side in SIDES)
    if chosen == rejected:
        raise RecordError(
            "has the same answer as chosen and as rejected: no preference can be learnt from it; "
            "leave the record out"
        )
    if all(each[0]["role"] == "assistant" for each in (chosen, rejected)):
        prompt = _prompt(record)
        if not prompt:
            raise RecordError(
                f"has a chosen and a rejected answer, and no prompt (it has {columns_of(record)}); "
                "add the column prompt"
            )
    else:
        prompt, chosen, rejected = _parted(chosen, rejected)
    return _conversation(record, prompt, chosen), _conversation(record, prompt, rejected)


def _parted(
    chosen: list[Conversation], rejected: list[Conversation]
) -> tuple[list[Conversation], list[Conversation], list[Conversation]]:
    """Part whole conversations where they differ first: what is ahead is the prompt."""
    most = min(len(chosen), len(rejected)) - 1
    alike = (number for number in range(most) if chosen[number] != rejected[number])
    shared = next(alike, most)
    if not shared or any(each[shared]["role"] != "assistant" for each in (chosen, rejected)):
        raise RecordError(
            "has a chosen and a rejected conversation that differ ahead of their answers; write "
            "one prompt, with two answers of the assistant"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _labelled(record: Record) -> Conversation:
    if "completion" in record:
        answer, prompt = _answer(record, "completion"), _prompt(record)
        if not prompt:
            raise RecordError(
                f"has an answer and no prompt (it has {columns_of(record)}); add the column prompt"
            )
        return _conversation(record, prompt, answer)
    messages = _prompt(record)
    if not messages or messages[-1]["role"] != "assistant":
        raise RecordError("is a conversation whose last message is no answer of the assistant")
    return _conversation(record, messages[:-1], messages[-1:])


def _label(record: Record) -> bool:
    column = next(name for name in LABEL_COLUMNS if name in record)
    value = record[column]
    found = value if isinstance(value, bool) else LABELS.get(str(value).strip().lower())
    if found is None:
        raise RecordError(f'has {value!r} in the column "{column}"; write true or false')
    return found


def _conversation(
    record: Record, prompt: list[Conversation], answer: list[Conversation]
) -> Conversation:
    learnt = sum(each["role"] == "assistant" for each in answer)
    if not learnt:
        raise RecordError("has an answer without a message of the assistant; write its role")
    found = with_tools(record, [*prompt, *answer])
    check_conversation(found)
    return {**found, LEARNT_ANSWERS: learnt}


def _prompt(record: Record) -> list[Conversation]:
    """Read what is ahead of the answers; [] where no column has it."""
    if isinstance(record.get("prompt"), str):
        return [*system_of(record), message("user", record["prompt"])]
    if isinstance(record.get("instruction"), str):
        given = record.get("input")
        parts = [record["instruction"], given if isinstance(given, str) else ""]
        return [*system_of(record), message("user", "\n".join(filter(None, parts)))]
    for name in ("prompt", *MESSAGE_COLUMNS):
        if found := messages_of(record.get(name)):
            return [*([] if found[0]["role"] == "system" else system_of(record)), *found]
    return []


def _answer(record: Record, column: str) -> list[Conversation]:
    """Read an answer: a text, a message, or messages."""
    value = record[column]
    if isinstance(value, str):
        return [message("assistant", value)]
    found = messages_of([value] if isinstance(value, dict) else value)
    if not found:
        raise RecordError(
            f'has no answer in the column "{column}"; write a text, or messages with role and '
            "content"
        )
    return found
