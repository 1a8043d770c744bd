"""Text to token ids and back. On disk a tokenizer is a Hugging Face tokenizer.json and nothing else."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mpillm.errors import DataError, UsageError
from mpillm.tokens.decoding import StreamDecoder, byte_symbols, bytes_of_token

END_OF_TEXT = "<|endoftext|>"
# What other tokenizers call it, in the order in which we ask.
KNOWN_ENDS_OF_TEXT = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "[EOS]",
    "<|eos|>",
    "<｜end▁of▁sentence｜>",
)
SMALLEST_VOCABULARY = 256 + 1
PART_CHARACTERS = 1 << 16
PARTS_AT_ONCE = 64
# Between these two the pre-tokeniser of GPT-2 always splits, so a long text may be cut here without changing an id.
SAFE_CUT = re.compile(r"\S\n(?=\S)")

Ids = np.ndarray[Any, np.dtype[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """How a token id is stored: two bytes while they hold every id, else four. The one place of this rule."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Tokenizer:
    """A tokenizer.json with its end-of-text token: `encode` and `decode` never add or obey special tokens in a text."""

    def __init__(self, text: str, name: str = "", end_of_text: str | None = None) -> None:
        """`text` is the JSON; `name` is shown to people ("" → "bytes" or "bpe").

        Raises DataError when the JSON is no tokenizer or its end-of-text token isn't known.
        """
        self._json = text
        try:
            self._inner = tokenizers.Tokenizer.from_str(text)
        except Exception as failure:  # the library raises bare Exception
            raise DataError(
                f"this is no tokenizer.json that the tokenizers library {tokenizers.__version__} understands: "
                f"{failure}; give the tokenizer.json of a fast Hugging Face tokenizer"
            ) from failure
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        self._spec: dict[str, Any] = json.loads(text)
        self._is_bytes = _is_byte_tokenizer(self._spec)
        self._may_cut = _splits_like_gpt2(self._spec)
        self.name = name or ("bytes" if self._is_bytes else "bpe")
        self.vocab_size = (
            max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        )
        self.end_of_text = end_of_text or self._known_end_of_text()
        self.eot_id = self._id_of_end_of_text()
        self.dtype = token_dtype(self.vocab_size)

    @classmethod
    def load(cls, path: str | Path, end_of_text: str | None = None, name: str = "") -> "Tokenizer":
        """Read a tokenizer.json, or the one in the folder `path`. Raises UsageError (no such file) and DataError."""
        path = Path(path)
        name = name or path.stem
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as failure:
            reason = getattr(failure, "strerror", None) or "not UTF-8 text"
            raise UsageError(
                f"cannot read the tokenizer {path}: {reason}; give `bpe`, `bytes` or the path of a tokenizer.json"
            ) from failure
        try:
            return cls(text, name, end_of_text)
        except DataError as failure:
            raise DataError(f"{path}: {failure}") from failure

    @classmethod
    def from_json(cls, text: str, name: str = "", end_of_text: str | None = None) -> "Tokenizer":
        return cls(text, name, end_of_text)

    def to_json(self) -> str:
        """The JSON that this tokenizer was made from, unchanged."""
        return self._json

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self._json.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()  # type: ignore[no-any-return]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, in `self.dtype`, without an end-of-text token. Uses rayon's threads."""
        if self._is_bytes:
            return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]
        parts = [list(_parts(text)) if self._may_cut else [text] for text in texts]
        ids = self._encode_parts([part for some in parts for part in some])
        return [np.concatenate([next(ids) for _ in some]) for some in parts]

    def _encode_parts(self, parts: list[str]) -> Iterator[Ids]:
        """In groups: the library's results take some hundred bytes a token."""
        for first in range(0, len(parts), PARTS_AT_ONCE):
            group = self._inner.encode_batch_fast(
                parts[first : first + PARTS_AT_ONCE], add_special_tokens=False
            )
            yield from (np.array(encoding.ids, self.dtype) for encoding in group)

    def decode(self, ids: Iterable[int] | Ids) -> str:
        """The text of `ids`; special tokens and ids beyond the vocabulary are left out, broken UTF-8 becomes U+FFFD."""
        if self._is_bytes:
            wide = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
            return (
                wide[(wide >= 0) & (wide < 256)]
                .astype(np.uint8)
                .tobytes()
                .decode("utf-8", "replace")
            )
        numbers = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        return self._inner.decode(
            [i for i in numbers if 0 <= i < self.vocab_size], skip_special_tokens=True
        )

    def stream(self) -> StreamDecoder:
        """A decoder that takes one id at a time and holds back what isn't yet a whole character."""
        return StreamDecoder(self.decode, self._token_bytes)

    @cached_property
    def _token_bytes(self) -> list[bytes] | None:
        """The bytes of each token, or None when this tokenizer isn't byte-level."""
        if (self._spec.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        special = {token["id"] for token in self._spec.get("added_tokens", []) if token["special"]}
        tokens = [self._inner.id_to_token(i) or "" for i in range(self.vocab_size)]
        return [b"" if i in special else bytes_of_token(token) for i, token in enumerate(tokens)]

    def _known_end_of_text(self) -> str:
        for token in KNOWN_ENDS_OF_TEXT:
            if self._inner.token_to_id(token) is not None:
                return token
        special = [token["content"] for token in self._spec.get("added_tokens", [])][:12]
        raise DataError(
            f"the tokenizer has none of the known end-of-text tokens ({' '.join(KNOWN_ENDS_OF_TEXT[:6])} …); "
            f"name yours with --end-of-text TOKEN; its added tokens are: {' '.join(special) or 'none'}"
        )

    def _id_of_end_of_text(self) -> int:
        found = self._inner.token_to_id(self.end_of_text)
        if found is None:
            raise DataError(
                f"the end-of-text token {self.end_of_text!r} isn't in the vocabulary of {self.vocab_size} tokens; "
                "give one that is with --end-of-text TOKEN"
            )
        return int(found)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE: any text can be written in it, and equal texts in equal order give equal bytes.

    The vocabulary is smaller than asked for when the texts hold too few different pairs. Raises UsageError.
    """
    check_vocab_size(vocab_size)
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(byte_symbols()),
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner.to_str(), "bpe")


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"a byte-level vocabulary holds 256 bytes and {END_OF_TEXT}, so at least {SMALLEST_VOCABULARY} tokens; "
            f"got --vocab-size {vocab_size}; ask for {SMALLEST_VOCABULARY} or more, or take --tokenizer bytes"
        )


def byte_tokenizer() -> Tokenizer:
    """One token per byte, its id the byte's value; end of text is 256. Encodes and decodes in NumPy."""
    inner = tokenizers.Tokenizer(
        models.BPE({symbol: i for i, symbol in enumerate(byte_symbols())}, [])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT])
    return Tokenizer(inner.to_str(), "bytes")


def _is_byte_tokenizer(spec: dict[str, Any]) -> bool:
    model, before = spec["model"], spec.get("pre_tokenizer") or {}
    return (
        model.get("type") == "BPE"
        and not model.get("merges")
        and spec.get("normalizer") is None
        and before.get("type") == "ByteLevel"
        and not before.get("add_prefix_space")
        and [token["id"] for token in spec.get("added_tokens", [])] == [256]
        and {k: v for k, v in model["vocab"].items() if v < 256}
        == {s: i for i, s in enumerate(byte_symbols())}
    )


def _splits_like_gpt2(spec: dict[str, Any]) -> bool:
    before = spec.get("pre_tokenizer") or {}
    plain = (
        before.get("type") == "ByteLevel"
        and not before.get("add_prefix_space")
        and before.get("use_regex")
    )
    return bool(plain) and spec.get("normalizer") is None


def _parts(text: str) -> Iterator[str]:
    """Cut a long text where that changes no id, so that threads share it and memory stays small."""
    start = 0
    while len(text) - start > PART_CHARACTERS and (
        found := SAFE_CUT.search(text, start + PART_CHARACTERS)
    ):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]
