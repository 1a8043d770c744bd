"""Token ids to text, one at a time: a character is shown when its last byte has come, and not before."""

import codecs
from collections.abc import Callable, Sequence
from functools import cache

# A tail of ids that still isn't a whole character after so many isn't going to be one: UTF-8 has four bytes at most.
LONGEST_TAIL = 8


@cache
def byte_symbols() -> tuple[str, ...]:
    """The printable symbol that byte-level tokenizers write for each byte value (Radford et al. 2019, GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


@cache
def _byte_of_symbol() -> dict[str, int]:
    return {symbol: byte for byte, symbol in enumerate(byte_symbols())}


def bytes_of_token(token: str) -> bytes:
    """The bytes that a byte-level token stands for; a token of other symbols stands for itself."""
    table = _byte_of_symbol()
    return bytes(table[s] for s in token) if all(s in table for s in token) else token.encode()


class StreamDecoder:
    """`push` each id as it comes and print what it returns; `finish` returns what was held back."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], token_bytes: Sequence[bytes] | None
    ) -> None:
        """`token_bytes[id]` where each token is a run of bytes; else the text is found by decoding a short tail."""
        self._decode, self._token_bytes = decode, token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token_id: int) -> str:
        """The text that is certain now, perhaps empty."""
        if self._token_bytes is not None:
            known = 0 <= token_id < len(self._token_bytes)
            return self._utf8.decode(self._token_bytes[token_id] if known else b"")
        self._ids.append(token_id)
        return self._new_text(final=len(self._ids) - self._shown > LONGEST_TAIL)

    def finish(self) -> str:
        """What was held back, with U+FFFD for a character that never became whole."""
        if self._token_bytes is not None:
            return self._utf8.decode(b"", final=True)
        return self._new_text(final=True)

    def _new_text(self, final: bool) -> str:
        # The ids shown last are decoded again as context: some decoders drop the space before the first token.
        before, now = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        if now.endswith("\ufffd") and not final:
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return now[len(before) :]
