"""Tokenizers: round trips, one rule for the dtype, streams, and what a wrong file says."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mpillm.errors import DataError, UsageError
from mpillm.tokens.text.text_cut import PART_CHARACTERS
from mpillm.tokens.tokenizer import Tokenizer, byte_tokenizer, token_dtype, train_bpe
from tests.pretrained import minilm

pytestmark = pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="no messages: serial pass only")

TEXTS = [
    "the cat sat on the mat\n",
    "naïve café 😀 – the end",
    "def f(x):\n    return x + 1\n\n\n  \nlast  line",
] * 9
BPE = train_bpe(TEXTS, 400)
BYTES = byte_tokenizer()
BOTH = pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
any_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65535, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_two_bytes_hold_every_id_up_to_65536_tokens(vocab_size, dtype):
    assert token_dtype(vocab_size) == np.dtype(dtype)


@BOTH
@given(text=any_text)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    [ids] = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert ids.dtype == tokenizer.dtype


@BOTH
@given(ids=st.lists(st.integers(0, 300), max_size=40))
def test_a_stream_says_what_decode_says(tokenizer, ids):
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


def test_a_stream_holds_back_half_a_character():
    stream = BYTES.stream()
    assert [stream.push(byte) for byte in "é!".encode()] == ["", "é", "!"]
    stream.push(0xF0)
    assert stream.finish() == "\ufffd"


def test_a_stream_of_a_tokenizer_that_is_not_byte_level():
    """Metaspace drops the first space of what it decodes: a stream must not lose the others."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"▁a": 0, "▁b": 1, "</s>": 2, "é": 3}, "</s>")
    )
    inner.pre_tokenizer, inner.decoder = (
        tokenizers.pre_tokenizers.Metaspace(),
        tokenizers.decoders.Metaspace(),
    )
    foreign = Tokenizer.from_json(inner.to_str())
    stream = foreign.stream()
    assert (
        "".join([*map(stream.push, [0, 1, 3, 0]), stream.finish()])
        == foreign.decode([0, 1, 3, 0])
        == "a bé a"
    )


def word_piece():
    words = ["[UNK]", "[EOS]", "play", "##ing", "##ed", "the", ".", ",", "don", "'", "##t", "é"]
    inner = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens(["[UNK]", "[EOS]"])
    inner.add_tokens(["đem"])
    return inner


def unigram():
    pieces = ["<unk>", "</s>", "▁a", "b", "▁", "é", "▁b"]
    inner = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0, False))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.add_special_tokens(["</s>"])
    inner.add_tokens(["č"])
    return inner


def byte_fallback():
    """Make a tokenizer as Llama 2's: words, and bytes for what they lack."""
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "é"]
    inner = tokenizers.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(["<unk>", "</s>"])
    return inner


def byte_level():
    inner = tokenizers.Tokenizer.from_str(train_bpe(["the cat"], 262).to_json())
    inner.add_tokens(["đem", "č", "Ö"])
    inner.add_special_tokens(["<pad>"])
    return inner


@pytest.mark.parametrize("make", [word_piece, unigram, byte_fallback, byte_level])
def test_any_stream_says_what_decode_says(make):
    """Unknown and special tokens too: the word after one keeps its space, its ## is not shown."""
    tokenizer = Tokenizer.from_json(make().to_str())
    generator = np.random.default_rng(0)
    last = tokenizer.vocab_size
    # Half of the ids are words and special tokens, however many bytes there are.
    few = [0, 1, *range(last - 6, last + 1), -1]
    for _ in range(400):
        ids = [
            int(generator.choice(few) if generator.random() < 0.5 else generator.integers(last))
            for _ in range(generator.integers(14))
        ]
        stream = tokenizer.stream()
        assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids), ids


def test_added_tokens_are_their_own_text():
    tokenizer = Tokenizer.from_json(byte_level().to_str())
    text = "thečđemÖ cat"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    stream = tokenizer.stream()
    assert "".join(map(stream.push, tokenizer.encode(text))) == text


def test_ids_beyond_any_vocabulary_are_refused():
    far = '{"model": {"type": "BPE", "vocab": {"</s>": 4000000000}, "merges": []}}'
    with pytest.raises(DataError, match=r"16,777,216 tokens, this one has the id 4,000,000,000"):
        Tokenizer.from_json(far)


def test_what_cannot_be_encoded_is_a_data_error():
    """Models without an unknown token raise a bare Exception of the library."""
    for model in (models.Unigram([("</s>", 0.0)], None, False), models.WordLevel({"</s>": 0}, "?")):
        tokenizer = Tokenizer.from_json(tokenizers.Tokenizer(model).to_str())
        with pytest.raises(DataError, match=r"cannot encode the text: .* byte-level"):
            tokenizer.encode("abc")


@BOTH
def test_the_json_is_kept_as_it_is(tokenizer, folder, comm):
    path = folder / f"own-{comm.rank}.json"
    path.write_text(tokenizer.to_json())
    again = Tokenizer.load(path)
    assert again.to_json() == tokenizer.to_json()
    assert (again.sha256, again.vocab_size, again.eot_id) == (
        tokenizer.sha256,
        tokenizer.vocab_size,
        tokenizer.eot_id,
    )
    assert again.name == f"own-{comm.rank}"


def test_byte_ids_are_byte_values_and_the_same_as_the_librarys():
    text = "héllo\t\0 wörld"
    assert BYTES.encode(text) == list(text.encode())
    assert (BYTES.vocab_size, BYTES.eot_id, BYTES.name) == (257, 256, "bytes")
    library = tokenizers.Tokenizer.from_str(BYTES.to_json())
    assert library.encode(text).ids == BYTES.encode(text)
    assert library.decode(BYTES.encode(text)) == text
    assert Tokenizer.from_json(BYTES.to_json())._is_bytes
    assert not BPE._is_bytes


def test_a_special_token_in_a_text_is_text():
    assert BPE.eot_id not in BPE.encode("a<|endoftext|>b")
    assert BPE.decode([*BPE.encode("a"), BPE.eot_id]) == "a"


def trained(inner, trainer):
    inner.train_from_iterator([*TEXTS, "</s> [SEP]"], trainer)
    return inner


def unigram():
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    return trained(inner, trainer)


def wordpiece():
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trained(inner, trainers.WordPieceTrainer(special_tokens=special, show_progress=False))
    pairs = [(token, inner.token_to_id(token)) for token in special[1:]]
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, pairs)
    return inner


def words():
    inner = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["[UNK]", "[SEP]"]
    return trained(inner, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))


def byte_fallback():
    """As Llama 2's: spaces as metaspace, bytes for what the vocabulary lacks, a word of its own."""
    special = ["<unk>", "<s>", "</s>"]
    symbols = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thecasm", "th", "the"]
    inner = tokenizers.Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(symbols)},
            [("t", "h"), ("th", "e")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(special)
    inner.add_tokens(["café"])
    return inner


KINDS = {"</s>": [unigram, byte_fallback], "[SEP]": [wordpiece, words]}
MADE = [(make, end) for end, makers in KINDS.items() for make in makers]


@pytest.mark.parametrize(("make", "end"), MADE)
def test_each_kind_is_the_library_s(make, end):
    """Ids, and texts of ids; added tokens that are no special ones are found in a text."""
    inner = make()
    ours = Tokenizer.from_json(inner.to_str(), end_of_text=end)
    for text in (*TEXTS[:3], "a cat, 日本 naïve café!", "", " two  spaces "):
        expected = inner.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected
        assert ours.decode(expected) == inner.decode(expected)
    assert ours.to_json() == inner.to_str()


def test_a_published_wordpiece_is_the_library_s():
    path = minilm() / "tokenizer.json"
    ours = Tokenizer.load(path, end_of_text="[SEP]")
    library = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    library.no_truncation()
    library.no_padding()
    for text in (*TEXTS[:3], "Unaffable, 日本 naïve café!", ""):
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == library.decode(ids)
    assert ours.eot_id not in ours.encode("a [SEP] b")


@pytest.mark.parametrize(("make", "end"), MADE)
def test_no_text_spells_a_special_token(make, end):
    """A Unigram has special tokens among its pieces, and a list of words among its words."""
    inner = make()
    ours = Tokenizer.from_json(inner.to_str(), end_of_text=end)
    assert ours.eot_id in inner.encode(f"the {end} cat").ids
    # The last one is </s> once NFKC has changed it.
    for text in (f"the {end} cat", end, f"the{end}", f"{end} {end}", "the ＜/s＞ cat"):
        assert ours.eot_id not in ours.encode(text)
    if make in (unigram, byte_fallback):
        assert ours.decode(ours.encode(f"the {end} cat")) == f"the {end} cat"


def test_a_special_token_that_only_a_text_could_mean_is_an_error():
    inner = tokenizers.Tokenizer(models.WordLevel({"the": 0, "</s>": 1}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["</s>"])
    tokenizer = Tokenizer.from_json(inner.to_str())
    assert tokenizer.encode("the the") == [0, 0]
    with pytest.raises(DataError, match="the text has '</s>', which the tokenizer bpe reads as"):
        tokenizer.encode("the </s> the")


def test_a_long_text_is_cut_without_changing_an_id():
    text = "".join(
        f"line {i} \n\n  \t\nx = {i}\n\n" + "y\n" * (i % 7) for i in range(PART_CHARACTERS // 8)
    )
    assert len(text) > 2 * PART_CHARACTERS
    assert BPE.encode(text) == tokenizers.Tokenizer.from_str(BPE.to_json()).encode(text).ids
    assert BPE.decode(BPE.encode_batch([text])[0]) == text


def test_a_long_text_in_blocks_has_the_ids_of_the_whole():
    text = "".join(f"word{i}, 中文。 and\n" for i in range(PART_CHARACTERS // 8))
    for size in (999, 1 << 17):
        blocks = (text[i : i + size] for i in range(0, len(text), size))
        ids = [ids for _, ids in BPE.encode_blocks(blocks)]
        assert np.concatenate(ids).tolist() == BPE.encode(text)
    assert BPE.cutter.n_forced == 0


def test_training_gives_the_same_bytes_on_any_number_of_threads(python):
    program = (
        "import pathlib, mpillm.tokens.tokenizer as t; texts = [p.read_text() for p in "
        "sorted(pathlib.Path(t.__file__).parent.parent.rglob('*.py'))]; "
        "print(t.train_bpe(texts, 1000).sha256)"
    )
    runs = [python("-c", program, RAYON_NUM_THREADS=threads) for threads in ("1", "2", "2")]
    assert {run.returncode for run in runs} == {0}, runs[0].stderr
    assert len({run.stdout for run in runs}) == 1


def test_the_vocabulary_holds_every_byte():
    with pytest.raises(UsageError, match=r"at least 257 tokens; got --vocab-size 256"):
        train_bpe(TEXTS, 256)
    assert train_bpe(TEXTS, 257).vocab_size == 257


def foreign_json(*special):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    inner.add_special_tokens(list(special))
    return inner.to_str()


@pytest.mark.parametrize("token", ["</s>", "<eos>", "<|end_of_text|>", "<|im_end|>"])
def test_a_foreign_end_of_text_is_found(token):
    found = Tokenizer.from_json(foreign_json("<pad>", token))
    assert (found.end_of_text, found.eot_id) == (token, 3)


def test_an_unknown_end_of_text_must_be_named():
    with pytest.raises(DataError, match="--end-of-text TOKEN"):
        Tokenizer.from_json(foreign_json("[FIN]"))
    assert Tokenizer.from_json(foreign_json("[FIN]"), end_of_text="[FIN]").eot_id == 2
    with pytest.raises(DataError, match="isn't in the vocabulary"):
        Tokenizer.from_json(foreign_json("[FIN]"), end_of_text="[END]")


@pytest.mark.parametrize("text", ["", "{}", "no json", json.dumps({"model": 1}), "[1]"])
def test_what_is_no_tokenizer(text, folder, comm):
    path = folder / f"{comm.rank}.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"{comm.rank}.json"):
        Tokenizer.load(path)


def test_a_missing_tokenizer():
    with pytest.raises(UsageError, match="cannot read the tokenizer"):
        Tokenizer.load("/nowhere/tokenizer.json")


def test_a_space_parts_words_where_no_other_token_has_one() -> None:
    assert byte_tokenizer().vocabulary.space == 32
    assert train_bpe(["one two two"] * 9, 300).vocabulary.space is None
