"""Text to token ids and back. On disk a tokenizer is a Hugging Face tokenizer.json alone."""

import codecs
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mpillm.errors import DataError, UsageError
from mpillm.system.json_text import from_json, to_json
from mpillm.system.plain_files import LARGEST_FILE, read_plain
from mpillm.tasks.vocabulary import Vocabulary
from mpillm.tokens.text.text_cut import TextCutter, training_parts

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
    "[SEP]",
    "<｜end▁of▁sentence｜>",
)
# A space as it is, of byte-level tokenizers, and of SentencePiece.
SPACES = frozenset(" Ġ▁")
SMALLEST_VOCABULARY = 256 + 1
# Sixty times the largest that is published: tables of this size still fit into memory.
LARGEST_VOCABULARY = 1 << 24
# The library's results take some hundred bytes a token: so many characters are encoded at once.
CHARACTERS_AT_ONCE = 1 << 21
# Ahead of a piece's name: characters of no meaning, which no text has in a row.
UNSPELT = "\ue000\uf8ff\ue000"
# Ids that don't end a character after 8 tokens never will: a UTF-8 character has at most 4 bytes.
LONGEST_TAIL = 8

Ids = np.ndarray[Any, np.dtype[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Choose the stored type of a token id: two bytes while they hold every id, else four."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Tokenizer:
    """A tokenizer.json with its end-of-text token.

    `encode` and `decode` never add special tokens, nor obey those in a text.
    """

    def __init__(self, text: str, name: str = "", end_of_text: str | None = None) -> None:
        """Parse `text`, the JSON; `name` is for messages ("" → "bytes" or "bpe").

        Raises DataError when the JSON is not a tokenizer or its end-of-text token isn't known.
        """
        self._json = text
        try:
            self._inner = tokenizers.Tokenizer.from_str(text)
            self._spec: dict[str, Any] = from_json(text)
        except BaseException as failure:
            raise DataError(
                "this is not a tokenizer.json that the tokenizers library "
                f"{tokenizers.__version__} understands: {_library_words(failure)}; "
                "give the tokenizer.json of a fast Hugging Face tokenizer"
            ) from failure
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        self._is_bytes = _is_byte_tokenizer(self._spec)
        self.cutter = TextCutter(_splits_like_gpt2(self._spec))
        self.name = name or ("bytes" if self._is_bytes else "bpe")
        self.vocab_size = (
            max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        )
        if self.vocab_size > LARGEST_VOCABULARY:
            raise DataError(
                f"the vocabulary may have {LARGEST_VOCABULARY:,} tokens, this one has the id "
                f"{self.vocab_size - 1:,}; give a tokenizer.json with smaller ids"
            )
        self.end_of_text = end_of_text or self._known_end_of_text()
        self.eot_id = self._id_of_end_of_text()
        self.dtype = token_dtype(self.vocab_size)

    @classmethod
    def load(cls, path: str | Path, end_of_text: str | None = None, name: str = "") -> "Tokenizer":
        """Read a tokenizer.json, or the one in the folder `path`.

        Raises UsageError (no such file) and DataError.
        """
        path = Path(path)
        name = name or path.stem
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = read_plain(path, most=LARGEST_FILE).decode("utf-8")
        except (OSError, UnicodeDecodeError) as failure:
            reason = getattr(failure, "strerror", None) or "not UTF-8 text"
            raise UsageError(
                f"cannot read the tokenizer {path}: {reason}; "
                "give `bpe`, `bytes` or the path of a tokenizer.json"
            ) from failure
        try:
            return cls(text, name, end_of_text)
        except DataError as failure:
            raise DataError(f"{path}: {failure}") from failure

    @classmethod
    def from_json(cls, text: str, name: str = "", end_of_text: str | None = None) -> "Tokenizer":
        return cls(text, name, end_of_text)

    def to_json(self) -> str:
        """Return the JSON that this tokenizer was made from, unchanged."""
        return self._json

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self._json.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()  # type: ignore[no-any-return]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Encode each text to ids of `self.dtype`, without end of text. Uses rayon's threads."""
        if self._is_bytes:
            return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]
        parts = [list(self.cutter.parts([text])) for text in texts]
        ids = self._encode_parts(part for some in parts for part in some)
        return [np.concatenate([next(ids)[1] for _ in some]) for some in parts]

    @cached_property
    def marks_rows(self) -> bool:
        """Whether its post-processor adds tokens to a text, such as [CLS] and [SEP], or <s>."""
        return any(self._marks)

    @cached_property
    def closes_rows(self) -> bool:
        """Whether its post-processor ends a text by a token, such as [SEP] or </s>."""
        return bool(self._marks and self._marks[-1])

    @cached_property
    def _marks(self) -> list[int]:
        """Of each token of a short text 1 where the post-processor has added it."""
        marks: list[int] = self._inner.encode("a", add_special_tokens=True).special_tokens_mask
        return marks

    def encode_rows(self, texts: Sequence[str]) -> list[tuple[Ids, list[tuple[int, int]]]]:
        """Encode whole texts with the tokens of the post-processor: ids, and the characters of
        each, from and to. An added token has none: (0, 0).
        """
        try:
            found = self._inner.encode_batch(list(texts), add_special_tokens=True)
        except BaseException as failure:
            raise self._cannot_encode(failure) from failure
        return [(np.array(each.ids, self.dtype), each.offsets) for each in found]

    def encode_rendered(self, texts: Sequence[str]) -> list[tuple[Ids, list[tuple[int, int]]]]:
        """Encode texts that a chat template wrote: special tokens are obeyed, and none is added.

        Ids, and the characters of each, from and to.
        """
        try:
            found = self._obeying.encode_batch(list(texts), add_special_tokens=False)
        except BaseException as failure:
            raise self._cannot_encode(failure) from failure
        return [(np.array(each.ids, self.dtype), each.offsets) for each in found]

    def decode_rendered(self, ids: Ids) -> str:
        """Decode ids with the special tokens among them."""
        return str(self._obeying.decode(ids.tolist(), skip_special_tokens=False))

    @cached_property
    def _obeying(self) -> Any:
        # A post-processor may cut white space off the places of tokens.
        inner = tokenizers.Tokenizer.from_str(to_json({**self._spec, "post_processor": None}))
        inner.no_truncation()
        inner.no_padding()
        return inner

    @property
    def special_texts(self) -> list[str]:
        """The texts of the special tokens."""
        texts = {number: text for text, number in self.vocabulary.special.items()}
        return [texts[number] for number in sorted(self._special)]

    def _cannot_encode(self, failure: BaseException) -> DataError:
        # Where a model has no unknown token, the library fails at what it lacks.
        return DataError(
            f"the tokenizer {self.name} cannot encode the text: "
            f"{_library_words(failure)}; take a byte-level tokenizer, which has all bytes"
        )

    def encode_blocks(self, blocks: Iterable[str]) -> Iterator[tuple[str, Ids]]:
        """Encode a text of blocks in bounded memory; yield its parts with their ids, in order."""
        if self._is_bytes:
            return ((t, np.frombuffer(t.encode(), np.uint8).astype(self.dtype)) for t in blocks)
        return self._encode_parts(self.cutter.parts(blocks))

    def _encode_parts(self, parts: Iterable[str]) -> Iterator[tuple[str, Ids]]:
        """Encode in groups, whose parts threads share."""
        group: list[str] = []
        characters = 0
        for part in parts:
            if characters + len(part) > CHARACTERS_AT_ONCE:
                yield from self._encode_group(group)
                group, characters = [], 0
            group.append(part)
            characters += len(part)
        yield from self._encode_group(group)

    def _encode_group(self, parts: list[str]) -> Iterator[tuple[str, Ids]]:
        for part, ids in zip(parts, self._encode_with(self._inner, parts), strict=True):
            yield part, self._as_text(part, ids)

    def _encode_with(self, inner: Any, parts: list[str]) -> list[Ids]:
        try:
            group = inner.encode_batch_fast(parts, add_special_tokens=False)
        except BaseException as failure:
            raise self._cannot_encode(failure) from failure
        return [np.array(encoding.ids, self.dtype) for encoding in group]

    def _as_text(self, part: str, ids: Ids) -> Ids:
        """Return the ids of `part` without special tokens, which a text may spell.

        The library finds none as such; but a Unigram has them among its pieces, and a vocabulary of
        words among its words. What only a special token spells is unknown. Raises DataError where
        the model has no unknown token.
        """
        if not self._is_reserved[ids].any():
            return ids
        if self._unreserved is not None:
            [ids] = self._encode_with(self._unreserved, [part])
        if (found := ids[self._is_reserved[ids]]).size:
            if self.unknown_id is None:
                raise DataError(
                    f"the text has {self._inner.id_to_token(int(found[0]))!r}, which the tokenizer "
                    f"{self.name} reads as its special token; take it out of the text"
                )
            ids = np.where(self._is_reserved[ids], np.array(self.unknown_id, ids.dtype), ids)
        return ids

    @cached_property
    def _is_reserved(self) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Whether an id is that of a special token, the unknown one apart."""
        found = np.zeros(self.vocab_size, bool)
        found[[number for number in self._special if number != self.unknown_id]] = True
        return found

    @cached_property
    def _unreserved(self) -> Any:
        """The same Unigram with special pieces that no text spells; None for another model."""
        model = self._spec["model"]
        if model.get("type") != "Unigram":
            return None
        pieces = [
            [UNSPELT + piece if self._is_reserved[number] else piece, score]
            for number, (piece, score) in enumerate(model["vocab"])
        ]
        # An added token has the id of the piece with its name.
        added = [
            {**token, "content": pieces[token["id"]][0]} if token["id"] < len(pieces) else token
            for token in self._spec.get("added_tokens", [])
        ]
        changed = {"added_tokens": added, "model": {**model, "vocab": pieces}}
        inner = tokenizers.Tokenizer.from_str(
            to_json({**self._spec, **changed, "post_processor": None})
        )
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        return inner

    def decode(self, ids: Iterable[int] | Ids) -> str:
        """Decode `ids` to text.

        Special tokens and ids beyond the vocabulary are left out; broken UTF-8 becomes U+FFFD.
        """
        if self._is_bytes:
            wide = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
            return (
                wide[(wide >= 0) & (wide < 256)]
                .astype(np.uint8)
                .tobytes()
                .decode("utf-8", "replace")
            )
        numbers = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        shown = [i for i in numbers if self._is_shown(i)]
        if self._token_bytes is not None:
            return b"".join(map(self._token_bytes.__getitem__, shown)).decode("utf-8", "replace")
        return self._inner.decode(shown, skip_special_tokens=True)

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a text; a special token spells its name.

        Ids beyond the vocabulary have none.
        """
        if self._token_bytes is not None:
            return self._token_bytes[token_id] if 0 <= token_id < self.vocab_size else b""
        token = self._inner.id_to_token(token_id) or ""
        if token_id in self._fallback_bytes:
            return bytes([int(token[3:5], 16)])
        # SentencePiece's sign of a space.
        return (token if token_id in self._special else token.replace("▁", " ")).encode()

    def stream(self) -> "StreamDecoder":
        """Make a decoder that takes one id at a time and returns whole characters."""
        return StreamDecoder(self.decode, self._is_shown, self._fallback_bytes, self._token_bytes)

    def _is_shown(self, token_id: int) -> bool:
        """Return whether an id has a text: special tokens and ids beyond the vocabulary don't."""
        return 0 <= token_id < self.vocab_size and token_id not in self._special

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What tasks know of it: its size, the end of text, and the added tokens by text."""
        added = self._inner.get_added_tokens_decoder()
        special = {token.content: number for number, token in sorted(added.items())}
        return Vocabulary(self.vocab_size, self.eot_id, special, space=self._space)

    @property
    def _space(self) -> int | None:
        """The token that alone parts words: all others are without a space."""
        known = self._inner.get_vocab(with_added_tokens=True)
        spaced = [(text, number) for text, number in known.items() if SPACES.intersection(text)]
        return spaced[0][1] if len(spaced) == 1 and len(spaced[0][0]) == 1 else None

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self._inner.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    @cached_property
    def _fallback_bytes(self) -> frozenset[int]:
        """The tokens <0x00> … <0xFF> of a tokenizer that decodes them as bytes."""
        decoder = self._spec.get("decoder") or {}
        parts = [decoder, *decoder.get("decoders", [])]
        if not any(part.get("type") == "ByteFallback" for part in parts):
            return frozenset()
        found = [self._inner.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        return frozenset(number for number in found if number is not None)

    @cached_property
    def _token_bytes(self) -> list[bytes] | None:
        """The bytes of each token, or None when this tokenizer isn't byte-level."""
        decoder = self._spec.get("decoder") or {}
        if decoder.get("type") == "Sequence" and len(decoder.get("decoders", [])) == 1:
            [decoder] = decoder["decoders"]
        if decoder.get("type") != "ByteLevel":
            return None
        table = [bytes_of_token(self._inner.id_to_token(i) or "") for i in range(self.vocab_size)]
        for number, token in self._inner.get_added_tokens_decoder().items():
            # An added token is its own text, whose letters may be symbols of bytes, too: č, đ, Ö.
            table[number] = token.content.encode()
        return table

    @property
    def chance(self) -> str:
        """What makes the encoding a matter of chance, by the file; "" for none."""
        model = self._spec["model"]
        found = [
            f"{name} {model[name]}"
            for name in ("dropout", "alpha", "nbest_size")
            if model.get(name)
        ]
        return f"{model.get('type', 'its model')} with {', '.join(found)}" if found else ""

    @cached_property
    def unknown_id(self) -> int | None:
        """The id of the unknown token; None where the model has none."""
        model = self._spec["model"]
        if model.get("unk_token") is not None:
            return self._inner.token_to_id(model["unk_token"])
        number = model.get("unk_id")
        return int(number) if isinstance(number, int) else None

    @property
    def drops_unknown(self) -> bool:
        """Whether the model leaves out, without a token, what its vocabulary lacks: a BPE does."""
        return self._spec["model"].get("type", "BPE") == "BPE" and self.unknown_id is None

    @property
    def keeps_all(self) -> bool:
        """Whether every text comes back by construction: it has all bytes and changes none."""
        if self._is_bytes:
            return True
        plain = [token for token in self._spec.get("added_tokens", []) if not token["special"]]
        vocabulary = self._spec["model"].get("vocab", {})
        return (
            self._token_bytes is not None
            and _is_byte_level(self._spec)
            and not plain
            and not self.chance
            and all(symbol in vocabulary for symbol in byte_symbols())
        )

    def _known_end_of_text(self) -> str:
        for token in KNOWN_ENDS_OF_TEXT:
            if self._inner.token_to_id(token) is not None:
                return token
        special = [token["content"] for token in self._spec.get("added_tokens", [])][:12]
        raise DataError(
            "the tokenizer has none of the known end-of-text tokens "
            f"({' '.join(KNOWN_ENDS_OF_TEXT[:6])} …); name yours with --end-of-text TOKEN; "
            f"its added tokens are: {' '.join(special) or 'none'}"
        )

    def _id_of_end_of_text(self) -> int:
        found = self._inner.token_to_id(self.end_of_text)
        if found is None:
            raise DataError(
                f"the end-of-text token {self.end_of_text!r} isn't in the vocabulary of "
                f"{self.vocab_size} tokens; give one that is with --end-of-text TOKEN"
            )
        return int(found)


class StreamDecoder:
    """Token ids to text as they come: a character is returned when its last byte is there.

    `push` each id and print the result; `finish` returns the rest.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        is_shown: Callable[[int], bool],
        fallback_bytes: frozenset[int],
        token_bytes: Sequence[bytes] | None,
    ) -> None:
        """Decode by `token_bytes[id]` where each token is a run of bytes, else by `decode`.

        `is_shown`: whether an id has a text. `fallback_bytes`: tokens of a byte each among others
        of text.
        """
        self._decode, self._is_shown = decode, is_shown
        self._fallback_bytes, self._token_bytes = fallback_bytes, token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token_id: int) -> str:
        """Take the next id; return the text that is certain now, perhaps empty."""
        if not self._is_shown(token_id):
            # Not kept as context either: the next word would lose its space.
            return ""
        if self._token_bytes is not None:
            return self._utf8.decode(self._token_bytes[token_id])
        self._ids.append(token_id)
        if token_id in self._fallback_bytes:
            # The library decodes such bytes as one: a wrong one changes all of them.
            return ""
        return self._new_text(final=len(self._ids) - self._shown > LONGEST_TAIL)

    def finish(self) -> str:
        """Return the rest, with U+FFFD for a character that never became whole."""
        if self._token_bytes is not None:
            return self._utf8.decode(b"", final=True)
        return self._new_text(final=True)

    def _new_text(self, final: bool) -> str:
        # The ids shown last are decoded again as context: some decoders drop the space before the
        # first token.
        before, now = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        if now.endswith("\ufffd") and not final:
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return now[len(before) :]


@cache
def byte_symbols() -> tuple[str, ...]:
    """List the printable symbol that byte-level tokenizers write for each byte value.

    GPT-2's table (Radford et al. 2019).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


@cache
def _byte_of_symbol() -> dict[str, int]:
    return {symbol: byte for byte, symbol in enumerate(byte_symbols())}


def bytes_of_token(token: str) -> bytes:
    """Decode a byte-level token to its bytes; a token with other symbols is taken as text."""
    table = _byte_of_symbol()
    return bytes(table[s] for s in token) if all(s in table for s in token) else token.encode()


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE: it encodes any text, and equal texts in equal order give equal bytes.

    The vocabulary is smaller than asked for when the texts hold too few different pairs.
    Raises UsageError.
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
    inner.train_from_iterator((part for text in texts for part in training_parts(text)), trainer)
    return Tokenizer(inner.to_str(), "bpe")


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"a byte-level vocabulary holds 256 bytes and {END_OF_TEXT}, so at least "
            f"{SMALLEST_VOCABULARY} tokens; got --vocab-size {vocab_size}; "
            f"ask for {SMALLEST_VOCABULARY} or more, or take --tokenizer bytes"
        )
    if vocab_size > LARGEST_VOCABULARY:
        raise UsageError(
            f"--vocab-size is {LARGEST_VOCABULARY:,} or less, got {vocab_size:,}; "
            "published vocabularies have 30,000 to 260,000 tokens"
        )


def byte_tokenizer() -> Tokenizer:
    """Make the tokenizer of bytes: a token's id is its byte, 256 ends a text; it runs in NumPy."""
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


def _is_byte_level(spec: dict[str, Any]) -> bool:
    """Return whether all of a text, and nothing else, becomes symbols of bytes."""
    before = spec.get("pre_tokenizer") or {}
    plain = before.get("type") == "ByteLevel" and not before.get("add_prefix_space")
    return plain and spec.get("normalizer") is None


def _splits_like_gpt2(spec: dict[str, Any]) -> bool:
    # An added token that is no special one is found across the cuts.
    added = [token for token in spec.get("added_tokens", []) if not token.get("special")]
    return _is_byte_level(spec) and bool(spec["pre_tokenizer"].get("use_regex")) and not added


def _library_words(failure: BaseException) -> str:
    """Return the words of the tokenizers library, which raises bare and Rust's own exceptions."""
    if isinstance(failure, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
        raise failure
    return str(failure) or type(failure).__name__
