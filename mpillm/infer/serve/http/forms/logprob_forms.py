"""Log-probabilities in OpenAI's two forms: of completions, and of chats."""

from collections.abc import Sequence
from typing import Any

from mpillm.infer.serve.http.text_assembler import PlacedToken
from mpillm.infer.serve.requests import TokenLogprob
from mpillm.tokens.tokenizer import Tokenizer

# JSON has no infinity: OpenAI writes this for a token that cannot come.
LEAST_LOGPROB = -9999.0


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text; of a part of a character its bytes, as `bytes:\\xe2\\x80`."""
    found = tokenizer.bytes_of(token)
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def completion_logprobs(tokenizer: Tokenizer, placed: Sequence[PlacedToken]) -> dict[str, Any]:
    """Write the four lists of a completion's `logprobs`, an item a token."""
    rows = [each.logprob for each in placed]
    return {
        "tokens": [token_text(tokenizer, row.token) for row in rows],
        "token_logprobs": [_number(row.logprob) for row in rows],
        "top_logprobs": [_top(tokenizer, row) for row in rows],
        "text_offset": [each.place for each in placed],
    }


def _top(tokenizer: Tokenizer, row: TokenLogprob) -> dict[str, float | None] | None:
    """Write the likeliest tokens, and the one that came; None for the first of a prompt."""
    if row.logprob is None:
        return None
    pairs = [(row.token, row.logprob), *reversed(row.top)]
    # Of two tokens with one text the likelier comes later, and replaces the other.
    found = {token_text(tokenizer, token): _number(value) for token, value in pairs}
    found[token_text(tokenizer, row.token)] = max(
        value
        for token, value in pairs
        if token_text(tokenizer, token) == token_text(tokenizer, row.token)
    )
    return found


def chat_logprobs(tokenizer: Tokenizer, placed: Sequence[PlacedToken]) -> dict[str, Any]:
    """Write `logprobs` of a chat: an object a token, with its bytes and the likeliest ones."""
    return {
        "content": [
            {
                **_entry(tokenizer, each.logprob.token, each.logprob.logprob),
                "top_logprobs": [
                    _entry(tokenizer, token, value) for token, value in each.logprob.top
                ],
            }
            for each in placed
        ],
        "refusal": None,
    }


def _entry(tokenizer: Tokenizer, token: int, value: float | None) -> dict[str, Any]:
    found = tokenizer.bytes_of(token)
    text = found.decode("utf-8", "replace")
    return {"token": text, "logprob": _number(value), "bytes": list(found)}


def _number(value: float | None) -> float | None:
    return None if value is None else max(value, LEAST_LOGPROB)
