"""A tokenizer.json as the metadata of a GGUF file: the inverse of `gguf_tokenizer`.

llama.cpp knows a splitting rule by its name alone, and adds nothing of a file. So a tokenizer that
is not exactly one of its rules is refused: it would read other tokens.
"""

import base64
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import tokenizers

from mpillm.errors import DataError
from mpillm.system.json_text import from_json
from mpillm.tokens.gguf.gguf_tokenizer import (
    BYTE,
    BYTE_LEVEL,
    CONTROL,
    LLAMA3,
    NORMAL,
    NORMALIZED,
    RULES,
    SENTENCEPIECE,
    SPACE,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    GgufVocabulary,
    merges_of_scores,
)

# Of a pre-tokenizer's settings: they place tokens in the text, and change none.
_PLACES = "trim_offsets"
# The normalisers of `remove_extra_whitespaces`.
COLLAPSES = [
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
]
_REFUSED = "llama.cpp has no such rule, so it would read other tokens; export with --to hf"


def gguf_vocabulary(text: str, rows: int) -> GgufVocabulary:
    """Return the metadata of the tokenizer.json `text`, with a token for each row of the embedding.

    Raises DataError where llama.cpp has no such tokenizer.
    """
    spec: dict[str, Any] = from_json(text)
    model = spec["model"]
    if model.get("type") == "Unigram":
        found = _unigram(spec)
    elif model.get("type") == "BPE" and model.get("byte_fallback"):
        found = _sentencepiece(spec, rows)
    elif model.get("type") == "BPE":
        found = _byte_level(spec)
    else:
        raise DataError(f"its tokenizer is a {model.get('type')}: {_REFUSED}")
    found = _with_added(found, spec, rows)
    ids = tokenizers.Tokenizer.from_str(text).encode("").ids
    return replace(found, first=ids[0] if ids else None)


def _byte_level(spec: Mapping[str, Any]) -> GgufVocabulary:
    model, before = spec["model"], _plain(spec.get("pre_tokenizer"))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise DataError(
            "its tokenizer has no merges, and llama.cpp reads none without; export with --to hf"
        )
    known = {name: _plain(from_json(rule().__getstate__())) for name, rule in RULES.items()}
    rule = next((name for name in known if known[name] == before), None)
    normalizer = (spec.get("normalizer") or {}).get("type")
    if rule is None or (normalizer and (normalizer != "NFC" or rule not in NORMALIZED)):
        raise DataError(f"its tokenizer splits or changes a text in its own way: {_REFUSED}")
    if bool(model.get("ignore_merges")) != (rule == LLAMA3):
        raise DataError(f"its tokenizer splits as {rule} does, and merges otherwise: {_REFUSED}")
    tokens = _by_id(model["vocab"])
    return GgufVocabulary(BYTE_LEVEL, rule, tokens, _types(tokens), merges)


def _sentencepiece(spec: Mapping[str, Any], rows: int) -> GgufVocabulary:
    model, tokens = spec["model"], _by_id(spec["model"]["vocab"])
    first = _begins_with_space(spec)
    if first is None:
        raise DataError(f"its tokenizer splits or changes a text in its own way: {_REFUSED}")
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    # A token's score is the place of its first merge; those of no merge come last.
    place: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        place.setdefault(left + right, number)
    scores = [-float(place.get(token, len(merges))) for token in tokens]
    unknown = model["vocab"].get(model.get("unk_token"))
    types = _types(tokens, unknown, has_bytes=True)
    found = GgufVocabulary(
        SENTENCEPIECE, "default", tokens, types, scores=scores, unknown=unknown, space_first=first
    )
    if merges_of_scores(_with_added(found, spec, rows)) != merges:
        raise DataError(
            "its tokenizer merges in another order than any scores of its tokens mean: " + _REFUSED
        )
    return found


def _unigram(spec: Mapping[str, Any]) -> GgufVocabulary:
    model, first = spec["model"], _begins_with_space(spec)
    rules = _parts(spec.get("normalizer"), "normalizers")
    charsmap = b""
    if rules and rules[0].get("type") == "Precompiled":
        charsmap = base64.b64decode(rules.pop(0)["precompiled_charsmap"])
    if first is None or rules not in ([], COLLAPSES):
        raise DataError(f"its tokenizer splits or changes a text in its own way: {_REFUSED}")
    tokens = [token for token, _ in model["vocab"]]
    return GgufVocabulary(
        UNIGRAM,
        "default",
        tokens,
        _types(tokens, model.get("unk_id"), has_bytes=bool(model.get("byte_fallback"))),
        scores=[float(score) for _, score in model["vocab"]],
        unknown=model.get("unk_id"),
        space_first=first,
        collapses=bool(rules),
        charsmap=charsmap,
    )


def _begins_with_space(spec: Mapping[str, Any]) -> bool | None:
    """Return whether a text gets a space ahead of it; None where spaces are treated otherwise."""
    rules, before = spec.get("normalizer"), spec.get("pre_tokenizer") or {}
    if before.get("type") == "Metaspace":
        byte_pairs = spec["model"]["type"] == "BPE"
        if (byte_pairs and (rules or before.get("split", True))) or before["replacement"] != SPACE:
            return None
        return {"always": True, "first": True, "never": False}.get(
            str(before.get("prepend_scheme"))
        )
    parts = _parts(rules, "normalizers")
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if before or not parts or parts[-1] != replaced:
        return None
    ahead = parts[:-1]
    return bool(ahead) if ahead in ([], [{"type": "Prepend", "prepend": SPACE}]) else None


def _parts(value: Any, key: str) -> list[dict[str, Any]]:
    """Return the members of a sequence, or the lone value."""
    if not value:
        return []
    return list(value[key]) if value.get("type") == "Sequence" else [value]


def _plain(value: Any) -> Any:
    """Return a pre-tokenizer without what changes no token, a sequence of one as its member."""
    parts = _parts(value, "pretokenizers")
    return [{key: each for key, each in part.items() if key != _PLACES} for part in parts]


def _by_id(vocabulary: Mapping[str, int]) -> list[str]:
    """Return the tokens by their ids; "" where an id has none."""
    found = [""] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        found[number] = token
    return found


def _types(tokens: list[str], unknown: int | None = None, has_bytes: bool = False) -> list[int]:
    types = [NORMAL if token else UNUSED for token in tokens]
    if unknown is not None:
        types[unknown] = UNKNOWN
    if has_bytes:
        for number, token in enumerate(tokens):
            if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                types[number] = BYTE
    return types


def _with_added(found: GgufVocabulary, spec: Mapping[str, Any], rows: int) -> GgufVocabulary:
    """Add the added tokens, and fill up the rows of the embedding with unused ones."""
    added = {token["id"]: token for token in spec.get("added_tokens", [])}
    count = max(rows, len(found.tokens), *(number + 1 for number in added))
    tokens = [*found.tokens, *[""] * (count - len(found.tokens))]
    types = [*found.types, *[UNUSED] * (count - len(found.types))]
    scores = [*found.scores, *[0.0] * (count - len(found.scores))] if found.scores else []
    for number, token in added.items():
        tokens[number] = token["content"]
        if types[number] != UNKNOWN:
            types[number] = CONTROL if token["special"] else USER_DEFINED
    for number, token in enumerate(tokens):
        # llama.cpp's own name: each token has another text.
        tokens[number] = token or f"[PAD{number}]"
    return replace(found, tokens=tokens, types=types, scores=scores)
