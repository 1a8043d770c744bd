"""Records of preferences in their formats, and those that are refused."""

from typing import Any

import pytest

from mpillm.tokens.chat.preference_formats import preference_of, recognise_preference
from mpillm.tokens.text.records import RecordError


def role(name: str, text: str) -> dict[str, str]:
    return {"role": name, "content": text}


USER, GOOD, BAD = role("user", "ask"), role("assistant", "good"), role("assistant", "bad")
SHAREGPT = [{"from": "human", "value": "ask"}]
PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "ask", "chosen": "good", "rejected": "bad"},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "one message": {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
    "whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "with the prompt twice": {"prompt": "ask", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "sharegpt": {
        "conversations": SHAREGPT,
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "alpaca": {"instruction": "ask", "input": "", "chosen": "good", "rejected": "bad"},
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    assert recognise_preference(PAIRS[name]) == "preference"
    found = preference_of(PAIRS[name], "preference")
    assert found.chosen == {"messages": [USER, GOOD], "learnt_answers": 1}
    assert found.rejected == {"messages": [USER, BAD], "learnt_answers": 1}


def test_a_prompt_may_have_answers_that_are_not_learnt() -> None:
    prompt = [role("system", "be kind"), USER, role("assistant", "what?"), USER]
    found = preference_of({"prompt": prompt, "chosen": "good", "rejected": "bad"}, "preference")
    assert found.chosen is not None
    assert found.chosen["messages"] == [*prompt, GOOD]
    assert found.chosen["learnt_answers"] == 1


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "ask", "completion": "good", "label": True},
        {"prompt": [USER], "completion": [GOOD], "label": 1},
        {"messages": [USER, GOOD], "label": True},
        {"messages": [USER, GOOD], "kto_tag": "True"},
        {"conversations": [*SHAREGPT, {"from": "gpt", "value": "good"}], "kto_tag": True},
    ],
)
def test_answers_with_a_label(record: dict[str, Any]) -> None:
    assert recognise_preference(record) == "kto"
    found = preference_of(record, "kto")
    assert found[:2] == ({"messages": [USER, GOOD], "learnt_answers": 1}, None)
    column = "label" if "label" in record else "kto_tag"
    other = preference_of({**record, column: False}, "kto")
    assert other[:2] == (None, found.chosen)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "ask", "good": "a", "bad": "b"}, "has the columns prompt, good, bad, which no"),
        ({"prompt": "ask", "chosen": "a", "rejected": "a"}, "has the same answer as chosen and"),
        ({"prompt": "ask", "chosen": "a", "rejected": " "}, "has an empty answer"),
        ({"prompt": "ask", "chosen": "a", "rejected": 3}, 'no answer in the column "rejected"'),
        ({"chosen": "a", "rejected": "b"}, "no prompt .it has chosen, rejected.; add the column"),
        ({"chosen": [USER, GOOD], "rejected": [BAD]}, "differ ahead of their answers"),
        ({"prompt": "ask", "completion": "a", "label": "maybe"}, "has 'maybe' in the column"),
        ({"prompt": "ask", "completion": "", "label": True}, "has an empty answer"),
        ({"completion": "a", "label": True}, "no prompt .it has completion, label.; add the"),
        ({"messages": [USER], "label": True}, "whose last message is no answer"),
    ],
)
def test_wrong_records_are_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        preference_of(record, recognise_preference(record))


def test_records_of_the_other_format_are_refused() -> None:
    with pytest.raises(RecordError, match=r"is no record of the format kto .* by --format"):
        preference_of(PAIRS["texts"], "kto")
