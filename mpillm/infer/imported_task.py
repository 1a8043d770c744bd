"""Find the task that an imported model has learnt, with the settings that evaluation needs."""

from collections.abc import Mapping
from typing import Any

from mpillm.errors import MismatchError
from mpillm.models.spec import ModelSpec
from mpillm.system.json_text import from_json
from mpillm.tasks import task_catalog
from mpillm.tasks.vocabulary import Vocabulary

# Small files of a Hugging Face folder that may name the token which hides others.
NAMING = ("special_tokens_map.json", "tokenizer_config.json")
MASKS = ("[MASK]", "<mask>")


def imported_task(
    spec: ModelSpec, vocabulary: Vocabulary, texts: Mapping[str, str]
) -> tuple[dict[str, Any], str]:
    """Return the section [task] of a model, and the reason where it can be evaluated on none.

    `texts`: the small files of its folder. The section of a model without a task is the default's.
    """
    name, none = spec.usual_task, {"name": task_catalog.DEFAULT}
    if not name:
        return none, "its head gives no loss that a task of ours has"
    if name == "masked-lm":
        mask = _mask_token(vocabulary, texts)
        reason = "" if mask else f"its tokenizer has no token that hides others, such as {MASKS[0]}"
        return ({"name": name, "mask_token": mask}, "") if mask else (none, reason)
    texts_of = {number: text for text, number in vocabulary.special.items()}
    if name == "seq2seq" and spec.start_token in texts_of:
        return {"name": name, "start_token": texts_of[spec.start_token]}, ""
    return {"name": name}, ""


def check_evaluated(facts: Mapping[str, Any]) -> None:
    """Raise MismatchError where a checkpoint of these facts is a model without a task."""
    imported = facts.get("imported")
    if isinstance(imported, dict) and (reason := imported.get("no_task")):
        raise MismatchError(
            f"the model of {imported.get('from')} cannot be evaluated: {reason}; begin a run from "
            "it with train.start_from and another model.head, and evaluate that run"
        )


def _mask_token(vocabulary: Vocabulary, texts: Mapping[str, str]) -> str:
    """Return the added token that hides others; "" without one."""
    named = []
    for name in NAMING:
        try:
            value = from_json(texts.get(name, "{}"))
        except ValueError:
            continue
        token = value.get("mask_token") if isinstance(value, dict) else None
        named.append(token.get("content") if isinstance(token, dict) else token)
    known = (text for text in (*named, *MASKS) if isinstance(text, str))
    return next((text for text in known if text in vocabulary.special), "")
