"""The tokenizer in a GGUF file's metadata, as a tokenizer.json.

A GGUF file has tokens, merges and the name of a splitting rule. llama.cpp has each rule in code
(src/llama-vocab.cpp), and tokenizers as regular expressions.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from mpillm.errors import DataError

# Token types of GGUF.
CONTROL, USER_DEFINED = 3, 4
# Letters, digits in groups of up to three or alone, marks, spaces: the rules of GPT-4 and Qwen 2.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN % digits), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


# `tokenizer.ggml.pre` → the rule.
RULES: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "gpt-2": _gpt2,
        "smollm": _smollm,
        "llama-bpe": lambda: _split("{1,3}"),
        "qwen2": lambda: _split(""),
    }
)


def gguf_tokenizer(
    kind: str, rule: str, tokens: Sequence[str], types: Sequence[int], merges: Sequence[str]
) -> str:
    """Return the JSON of a byte-level BPE. `kind`, `rule`: `tokenizer.ggml.model` and `.pre`.

    Raises DataError for another kind or rule.
    """
    if kind != "gpt2" or rule not in RULES:
        raise DataError(
            f"its tokenizer is of the kind {kind!r} with the rule {rule!r}; mpillm reads the kind "
            f"gpt2 with the rules {', '.join(RULES)}: import the Hugging Face folder of the model"
        )
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    if len(types) != len(tokens) or not all(map(all, pairs)):
        raise DataError("its tokens, their types and its merges do not belong together")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        inner = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
    except Exception as failure:
        raise DataError(f"its merges name tokens that it lacks: {failure}") from failure
    inner.pre_tokenizer = RULES[rule]()
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind_of in zip(tokens, types, strict=True)
            if kind_of == CONTROL
        ]
    )
    inner.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind_of in zip(tokens, types, strict=True)
            if kind_of == USER_DEFINED
        ]
    )
    return str(inner.to_str())
