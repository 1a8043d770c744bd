"""Tokens as texts and bytes, for each kind of tokenizer."""

import json

import tokenizers
from tokenizers import decoders, models

from mpillm.infer.serve.http.forms.logprob_forms import (
    chat_logprobs,
    completion_logprobs,
    token_text,
)
from mpillm.infer.serve.http.text_assembler import PlacedToken
from mpillm.infer.serve.requests import TokenLogprob
from mpillm.tokens.tokenizer import Tokenizer, byte_tokenizer

BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


def sentencepiece() -> Tokenizer:
    """Return a tokenizer with signs of spaces, and a token for each byte."""
    vocab = {**BYTES, "▁cat": 256, "s": 257, "</s>": 258}
    inner = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    inner.add_special_tokens(["</s>"])
    return Tokenizer.from_json(inner.to_str(), "pieces", "</s>")


def test_each_token_has_its_bytes() -> None:
    plain, pieces = byte_tokenizer(), sentencepiece()
    assert [token_text(plain, each) for each in (65, 195, 256, 999)] == [
        "A",
        "bytes:\\xc3",
        "<|endoftext|>",
        "",
    ]
    assert [token_text(pieces, each) for each in (256, 257, 0xE2, 258)] == [
        " cat",
        "s",
        "bytes:\\xe2",
        "</s>",
    ]
    assert b"".join(map(pieces.bytes_of, (256, 0xE2, 0x82, 0xAC))).decode() == " cat€"


def test_two_tokens_of_one_text_keep_the_likelier() -> None:
    plain = byte_tokenizer()
    row = TokenLogprob(65, -2.0, ((66, -0.5), (65, -2.0), (67, float("-inf"))))
    found = completion_logprobs(plain, [PlacedToken(4, row)])
    assert found["top_logprobs"] == [{"A": -2.0, "B": -0.5, "C": -9999.0}]
    assert (found["text_offset"], found["token_logprobs"]) == ([4], [-2.0])
    # Both ids beyond the vocabulary have no text.
    beyond = TokenLogprob(900, -3.0, ((901, -1.0),))
    assert completion_logprobs(plain, [PlacedToken(0, beyond)])["top_logprobs"] == [{"": -1.0}]


def test_bytes_of_a_chat_are_numbers() -> None:
    row = TokenLogprob(195, float("-inf"), ((65, -1.0),))
    found = chat_logprobs(byte_tokenizer(), [PlacedToken(0, row)])
    [entry] = json.loads(json.dumps(found))["content"]
    assert (entry["token"], entry["bytes"], entry["logprob"]) == ("\ufffd", [195], -9999.0)
    assert entry["top_logprobs"] == [{"token": "A", "bytes": [65], "logprob": -1.0}]
