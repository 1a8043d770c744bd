"""Find the task that an imported model has learnt, with the settings that evaluation needs.

And the reverse: the keys of `config.json` by which transformers' pipelines know task and labels.
"""

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
# Tasks of a head of whole texts, and those that transformers' `problem_type` names.
OF_TEXTS = ("sequence-classification", "regression")
# Of classes without a name, transformers' own.
NO_NAME = "LABEL_{}"
LABEL_KEYS = ("id2label", "label2id", "problem_type")
OF_PROBLEM = {
    "single_label_classification": "sequence-classification",
    "multi_label_classification": "multi-label-classification",
    "regression": "regression",
}


def imported_task(
    spec: ModelSpec, vocabulary: Vocabulary, texts: Mapping[str, str]
) -> tuple[dict[str, Any], str]:
    """Return the section [task] of a model, and the reason where it can be evaluated on none.

    `texts`: the small files of its folder. The section of a model without a task is the default's.
    """
    name, none = spec.usual_task, {"name": task_catalog.DEFAULT}
    if not name:
        return none, "its head gives no loss that a task of ours has"
    if name in OF_TEXTS:
        return _task_of_texts(name, spec, texts)
    if name == "masked-lm":
        mask = _mask_token(vocabulary, texts)
        reason = "" if mask else f"its tokenizer has no token that hides others, such as {MASKS[0]}"
        return ({"name": name, "mask_token": mask}, "") if mask else (none, reason)
    texts_of = {number: text for text, number in vocabulary.special.items()}
    if name == "seq2seq" and spec.start_token in texts_of:
        return {"name": name, "start_token": texts_of[spec.start_token]}, ""
    return {"name": name}, ""


def _task_of_texts(
    name: str, spec: ModelSpec, texts: Mapping[str, str]
) -> tuple[dict[str, Any], str]:
    """Return the task of a head of texts, which `problem_type` of config.json names."""
    problem = _object_of(texts, "config.json").get("problem_type")
    classes = getattr(spec, "classes", 0)
    if problem == "regression" and classes > 1:
        none = {"name": task_catalog.DEFAULT}
        return none, f"it gives {classes} numbers of each text, and a task of ours learns one"
    return {"name": OF_PROBLEM.get(str(problem), name)}, ""


def check_evaluated(facts: Mapping[str, Any]) -> None:
    """Raise MismatchError where a checkpoint of these facts is a model without a task."""
    imported = facts.get("imported")
    if isinstance(imported, dict) and (reason := imported.get("no_task")):
        raise MismatchError(
            f"the model of {imported.get('from')} cannot be evaluated: {reason}; begin a run from "
            "it with train.start_from and another model.head, and evaluate that run"
        )


def with_labels(
    config: Mapping[str, Any], written: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a `config.json` with the labels and the `problem_type` of a checkpoint's task.

    `config`: the file that was imported, or nothing; `written`: the keys of the family, where
    `num_labels` is of a model with a head of classes; `facts`: of the checkpoint. A model may have
    more classes than its data; these keep transformers' names.
    """
    count = written.get("num_labels")
    if count is None:
        return {**config, **written}
    # The head may be another one than that of the file which was imported.
    own = {key: value for key, value in config.items() if key not in LABEL_KEYS}
    task = facts["recipe"].get("task", {}).get("name", "")
    known = list(facts.get("classes", ()))
    # Bare numbers are no names: so an import reads them, too.
    named = known != [str(number) for number in range(len(known))]
    if named and known:
        more = (NO_NAME.format(number) for number in range(len(known), len(known) + 2 * count))
        # A class of the data may have such a name already.
        names = [*known, *(name for name in more if name not in known)][:count]
        own["id2label"] = {str(number): name for number, name in enumerate(names)}
        own["label2id"] = {name: number for number, name in enumerate(names)}
    if problem := task_catalog.problem_type_of(task):
        own["problem_type"] = problem
    return {**own, **written}


def _mask_token(vocabulary: Vocabulary, texts: Mapping[str, str]) -> str:
    """Return the added token that hides others; "" without one."""
    named = []
    for name in NAMING:
        token = _object_of(texts, name).get("mask_token")
        named.append(token.get("content") if isinstance(token, dict) else token)
    known = (text for text in (*named, *MASKS) if isinstance(text, str))
    return next((text for text in known if text in vocabulary.special), "")


def _object_of(texts: Mapping[str, str], name: str) -> dict[str, Any]:
    """Parse a small file; empty where it is missing, or no object."""
    try:
        value = from_json(texts.get(name, "{}"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
