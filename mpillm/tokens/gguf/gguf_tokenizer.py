"""The tokenizer in a GGUF file's metadata, as a tokenizer.json.

A GGUF file has tokens with types, merges or scores, and the name of a splitting rule. llama.cpp has
each rule in code (src/llama-vocab.cpp), and tokenizers as regular expressions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from mpillm.errors import DataError

# Ahead of the metadata's keys.
PREFIX = "tokenizer.ggml."
# Token types of GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# The kinds of `tokenizer.ggml.model`: byte-level BPE, BPE of SentencePiece, Unigram.
BYTE_LEVEL, SENTENCEPIECE, UNIGRAM = "gpt2", "llama", "t5"
# What SentencePiece writes for a space.
SPACE = "▁"
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


LLAMA3 = "llama-bpe"
# `tokenizer.ggml.pre` → the rule.
RULES: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "gpt-2": _gpt2,
        "smollm": _smollm,
        LLAMA3: lambda: _split("{1,3}"),
        "qwen2": lambda: _split(""),
    }
)
# Of Qwen's tokenizer.json, and of no other rule's. llama.cpp leaves texts as they are.
NORMALIZED = ("qwen2",)


@dataclass(frozen=True)
class GgufVocabulary:
    """The metadata `tokenizer.ggml.*` of a tokenizer."""

    kind: str
    """`model`: one of BYTE_LEVEL, SENTENCEPIECE and UNIGRAM is read."""
    rule: str
    """`pre`: one of RULES for a byte-level BPE; else `default`."""
    tokens: Sequence[str]
    types: Sequence[int]
    """`token_type` of each token."""
    merges: Sequence[str] = ()
    """Of a byte-level BPE: the two parts, with a space between."""
    scores: Sequence[float] = ()
    """Of the other kinds."""
    first: int | None = None
    """`bos_token_id`, where `add_bos_token` is true."""
    unknown: int | None = None
    """`unknown_token_id`."""
    space_first: bool = True
    """`add_space_prefix`: whether a text begins with a space that it lacks."""
    collapses: bool = False
    """`remove_extra_whitespaces`: whether several spaces are one, and those at the ends none."""
    charsmap: Sequence[int] = ()
    """`precompiled_charsmap`: the bytes of SentencePiece's normalisation of characters."""


def gguf_tokenizer(vocabulary: GgufVocabulary) -> str:
    """Return the JSON of the tokenizer. Raises DataError for a kind or rule that is not read."""
    kind, rule, tokens = vocabulary.kind, vocabulary.rule, vocabulary.tokens
    make = {
        BYTE_LEVEL: _byte_level,
        SENTENCEPIECE: _sentencepiece,
        UNIGRAM: _unigram,
    }.get(kind)
    if make is None or (kind == BYTE_LEVEL and rule not in RULES):
        raise DataError(
            f"its tokenizer is of the kind {kind!r} with the rule {rule!r}; mpillm reads the kind "
            f"{BYTE_LEVEL} with the rules {', '.join(RULES)}, and the kinds {SENTENCEPIECE} and "
            f"{UNIGRAM}: import the Hugging Face folder of the model"
        )
    scored = kind != BYTE_LEVEL
    if len(vocabulary.types) != len(tokens) or (scored and len(vocabulary.scores) != len(tokens)):
        raise DataError("its tokens, their types and their scores do not belong together")
    try:
        inner = make(vocabulary)
        inner.add_special_tokens(_added(vocabulary, special=True, types=(CONTROL, UNKNOWN)))
        inner.add_tokens(_added(vocabulary, special=False, types=(USER_DEFINED,)))
        if vocabulary.first is not None:
            token = tokens[vocabulary.first]
            inner.post_processor = processors.TemplateProcessing(
                f"{token}:0 $A:0", f"{token}:0 $A:0 $B:1", [(token, vocabulary.first)]
            )
    except Exception as failure:
        raise DataError(f"its tokens and merges are no tokenizer: {failure}") from failure
    return str(inner.to_str())


def _added(vocabulary: GgufVocabulary, special: bool, types: tuple[int, ...]) -> list[Any]:
    return [
        AddedToken(token, special=special, normalized=False)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in types
    ]


def _used(vocabulary: GgufVocabulary) -> int:
    """Return the number of tokens ahead of those that fill up the rows of an embedding."""
    count = len(vocabulary.tokens)
    while count and vocabulary.types[count - 1] == UNUSED:
        count -= 1
    return count


def _byte_level(vocabulary: GgufVocabulary) -> Any:
    ids = {token: i for i, token in enumerate(vocabulary.tokens[: _used(vocabulary)])}
    pairs = [(left, right) for left, _, right in (m.partition(" ") for m in vocabulary.merges)]
    # Llama 3's whole words are tokens, whatever its merges make of them.
    inner = tokenizers.Tokenizer(models.BPE(ids, pairs, ignore_merges=vocabulary.rule == LLAMA3))
    if vocabulary.rule in NORMALIZED:
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = RULES[vocabulary.rule]()
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(vocabulary: GgufVocabulary) -> Any:
    """Make a BPE with the merges that the scores mean, and bytes for what it lacks."""
    tokens = vocabulary.tokens[: _used(vocabulary)]
    unknown = None if vocabulary.unknown is None else tokens[vocabulary.unknown]
    inner = tokenizers.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            merges_of_scores(vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=BYTE in vocabulary.types,
        )
    )
    first = [normalizers.Prepend(SPACE)] if vocabulary.space_first else []
    inner.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.space_first else []
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return inner


def merges_of_scores(vocabulary: GgufVocabulary) -> list[tuple[str, str]]:
    """List the merges of a BPE of SentencePiece: every cut of a token into two, by its score.

    The best score comes first; of equal ones those with the shorter parts, as transformers
    converts such models.
    """
    ids = {
        token: number
        for number, token in enumerate(vocabulary.tokens)
        if vocabulary.types[number] in (NORMAL, USER_DEFINED)
    }
    found = []
    for token, number in ids.items():
        score = vocabulary.scores[number]
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        here = [(left, right) for left, right in cuts if left in ids and right in ids]
        here.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(-score, len(left), len(right), left, right) for left, right in here]
    return [(left, right) for *_, left, right in sorted(found, key=lambda merge: merge[:3])]


def _unigram(vocabulary: GgufVocabulary) -> Any:
    used = _used(vocabulary)
    pieces = list(zip(vocabulary.tokens[:used], vocabulary.scores[:used], strict=True))
    has_bytes = BYTE in vocabulary.types
    inner = tokenizers.Tokenizer(models.Unigram(pieces, vocabulary.unknown, has_bytes))
    rules: list[Any] = []
    if vocabulary.charsmap:
        rules.append(normalizers.Precompiled(bytes(byte % 256 for byte in vocabulary.charsmap)))
    if vocabulary.collapses:
        rules += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules:
        inner.normalizer = normalizers.Sequence(rules)
    scheme = "always" if vocabulary.space_first else "never"
    inner.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme)
    metaspace = decoders.Metaspace(SPACE, scheme)
    inner.decoder = (
        decoders.Sequence([decoders.ByteFallback(), metaspace]) if has_bytes else metaspace
    )
    return inner
