"""Tokenizers in GGUF's metadata: each kind there and back, and as llama.cpp reads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from mpi4py import MPI
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mpillm.errors import DataError
from mpillm.infer.export_model import export_model
from mpillm.infer.import_model import import_model
from mpillm.system.console import Console
from mpillm.tokens.gguf.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    RULES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    GgufVocabulary,
    gguf_tokenizer,
    merges_of_scores,
)
from mpillm.tokens.gguf.gguf_vocabulary import gguf_vocabulary
from mpillm.tokens.tokenizer import Tokenizer, byte_symbols, train_bpe
from tests.pretrained import peer
from tests.published import SPEC, publish

pytestmark = pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="no messages: serial pass only")
TEXT = "the cat sat on the mat, the fat cat. "
TEXTS = (TEXT, "It's 2026: 12 cats\n\n  at  the mat", "日本 é 🦊", "the </s> cat", "<|end|>cats")
QUIET = Console(speaks=False)


def byte_level(rule: str) -> GgufVocabulary:
    tokens = [*sorted(byte_symbols()), "th", "the", "Ġthe", "cat", "<|end|>", "cats"]
    types = [NORMAL] * 260 + [CONTROL, USER_DEFINED]
    merges = ["t h", "th e", "Ġ the", "c a", "ca t"]
    return GgufVocabulary("gpt2", rule, [*tokens, "ca"], [*types, NORMAL], merges, first=260)


def sentencepiece(space_first: bool = True) -> GgufVocabulary:
    """Pieces with scores, of which "the" has two cuts, as SentencePiece stores them."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    pieces = ["▁t", "he", "▁the", "at", "▁c", "▁cat", "th", "the", *"▁thecasmonf,."]
    scores = [0.0] * 259 + [-float(number) for number in range(len(pieces))]
    return GgufVocabulary(
        "llama",
        "default",
        [*tokens, *pieces],
        [*types, *[NORMAL] * len(pieces)],
        scores=scores,
        first=1,
        unknown=0,
        space_first=space_first,
    )


def unigram() -> GgufVocabulary:
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    inner.train_from_iterator([TEXT, "the mats", "cats at the mat"] * 5, trainer)
    return gguf_vocabulary(inner.to_str(), 0)


MADE: dict[str, Callable[[], GgufVocabulary]] = {
    **{rule: lambda rule=rule: byte_level(rule) for rule in RULES},
    "llama": sentencepiece,
    "llama without a space": lambda: sentencepiece(space_first=False),
    "t5": unigram,
}


def end_of(vocabulary: GgufVocabulary) -> str:
    return "</s>" if vocabulary.scores else "<|end|>"


@pytest.mark.parametrize("name", MADE)
def test_each_kind_comes_back(name: str) -> None:
    """With as many unused tokens as the embedding has more rows, which are left out again."""
    vocabulary = MADE[name]()
    count = len(vocabulary.tokens)
    text = gguf_tokenizer(vocabulary)
    found = gguf_vocabulary(text, count + 3)
    assert list(found.tokens[:count]) == list(vocabulary.tokens)
    assert list(found.types) == [*vocabulary.types, UNUSED, UNUSED, UNUSED]
    assert (found.kind, found.rule, found.merges) == (
        vocabulary.kind,
        vocabulary.rule,
        vocabulary.merges,
    )
    assert (found.first, found.unknown) == (vocabulary.first, vocabulary.unknown)
    again = gguf_tokenizer(found)
    one, other = (Tokenizer.from_json(each, end_of_text=end_of(found)) for each in (text, again))
    assert (one.vocab_size, other.vocab_size) == (count, count)
    for each in TEXTS:
        assert one.encode(each) == other.encode(each)


def test_merges_are_those_of_the_scores() -> None:
    merges = merges_of_scores(sentencepiece())
    assert merges[:3] == [("▁", "t"), ("h", "e"), ("▁", "the")]
    assert {("th", "e"), ("t", "he"), ("▁t", "he")} < set(merges)
    tokenizer = Tokenizer.from_json(gguf_tokenizer(sentencepiece()), end_of_text="</s>")
    pieces = [tokenizer._inner.id_to_token(number) for number in tokenizer.encode("the cat é")]
    assert pieces == ["▁the", "▁cat", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("the cat é")) == "the cat é"


def test_a_text_of_the_kind_llama_begins_with_the_token_that_it_names() -> None:
    inner = tokenizers.Tokenizer.from_str(gguf_tokenizer(sentencepiece()))
    assert inner.encode("the").ids[0] == 1
    assert inner.encode("the", add_special_tokens=False).ids[0] != 1


@pytest.mark.parametrize("name", MADE)
def test_llama_cpp_reads_the_same_tokens(tmp_path: Path, name: str) -> None:
    peer("xllamacpp")
    from readers.llama_cpp import LlamaCpp

    vocabulary = MADE[name]()
    text = gguf_tokenizer(vocabulary)
    hub = publish(tmp_path / "hub", SPEC.replace(vocab_size=300))
    config = json.loads((hub / "config.json").read_text())
    end = list(vocabulary.tokens).index(end_of(vocabulary))
    (hub / "config.json").write_text(json.dumps({**config, "eos_token_id": end}))
    (hub / "tokenizer.json").write_text(text)
    comm = MPI.COMM_SELF
    import_model(hub, tmp_path / "run", comm, QUIET)
    export_model(tmp_path / "run", tmp_path / "m.gguf", "gguf", "float32", comm, QUIET)
    ours = Tokenizer.from_json(text, end_of_text=end_of(vocabulary))
    with LlamaCpp(tmp_path / "m.gguf", context=32) as server:
        for each in TEXTS:
            assert server.encode(each) == ours.encode(each), each


def changed(text: str, **changes: Any) -> str:
    spec = json.loads(text)
    model = changes.pop("model", {})
    return json.dumps({**spec, **changes, "model": {**spec["model"], **model}})


BPE = train_bpe([TEXT], 270).to_json()
SPLIT = {"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated", "invert": False}
SPACED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (changed(BPE, pre_tokenizer=SPLIT), "splits or changes a text in its own way"),
        (changed(BPE, pre_tokenizer=SPACED), "splits or changes a text in its own way"),
        (changed(BPE, normalizer={"type": "NFC"}), "splits or changes a text in its own way"),
        (changed(BPE, model={"ignore_merges": True}), "splits as gpt-2 does, and merges otherwise"),
        (changed(BPE, model={"merges": []}), r"has no merges, and llama\.cpp reads none without"),
        (
            changed(gguf_tokenizer(sentencepiece()), pre_tokenizer=SPLIT),
            "splits or changes a text in its own way",
        ),
        (
            changed(gguf_tokenizer(sentencepiece()), model={"merges": [["t", "h"], ["h", "e"]]}),
            "merges in another order than any scores",
        ),
        (
            changed(gguf_tokenizer(unigram()), normalizer={"type": "NFKC"}),
            "splits or changes a text in its own way",
        ),
        (
            tokenizers.Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1})).to_str(),
            "its tokenizer is a WordPiece: llama.cpp has no such rule",
        ),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        gguf_vocabulary(text, 300)


def test_normalisers_of_a_unigram_come_back() -> None:
    inner = tokenizers.Tokenizer.from_str(gguf_tokenizer(unigram()))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    )
    found = gguf_vocabulary(inner.to_str(), 0)
    assert found.collapses
    again = tokenizers.Tokenizer.from_str(gguf_tokenizer(found))
    assert again.encode("  the   cat ").tokens == inner.encode("  the   cat ").tokens


def test_what_does_not_belong_together_is_refused() -> None:
    good = sentencepiece()
    for wrong in (
        GgufVocabulary("llama", "default", good.tokens, good.types, scores=[0.0]),
        GgufVocabulary("gpt2", "gpt-2", ["a"], [NORMAL], ["b c"]),
        GgufVocabulary("gpt2", "gpt-2", ["a"], []),
        GgufVocabulary("llama", "default", ["a"], [NORMAL], scores=[0.0], unknown=9),
    ):
        with pytest.raises(DataError, match="its tokens"):
            gguf_tokenizer(wrong)
    for kind in ("bert", "rwkv"):
        with pytest.raises(DataError, match=f"of the kind '{kind}' .* import the Hugging Face"):
            gguf_tokenizer(GgufVocabulary(kind, "default", ["a"], [NORMAL]))
