"""A tokenizer that loses text is refused, with what is lost; --lossy keeps a note of it."""

import io
from pathlib import Path

import pytest
import tokenizers
from mpi4py import MPI
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mpillm.errors import DataError
from mpillm.system.console import Console
from mpillm.tokens.losses import LossCheck, Losses, check_chance, kind_of_loss
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.tokenizer import Tokenizer, byte_symbols, byte_tokenizer, train_bpe

LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"


def letters(**options: object) -> tokenizers.Tokenizer:
    """Make a BPE of single letters, without bytes and without an unknown token."""
    vocabulary = {letter: number for number, letter in enumerate(LETTERS)}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], **options))
    # Without a decoder the library puts a space between all tokens.
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(["</s>"])
    return inner


def bert() -> tokenizers.Tokenizer:
    words = ["[UNK]", "[SEP]", "the", "cat", "sat", ".", "##s"]
    inner = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens(["[UNK]", "[SEP]", "</s>"])
    return inner


def unigram() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁the", -1.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in LETTERS if letter != " "]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, 0, False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return inner


def check(inner: tokenizers.Tokenizer, *texts: str) -> Losses:
    tokenizer = Tokenizer.from_json(inner.to_str())
    check = LossCheck(tokenizer)
    check.see(texts, tokenizer.encode_batch(texts))
    return check.total(MPI.COMM_SELF)


@pytest.mark.parametrize("normalizer", [normalizers.NFC, normalizers.NFKC, normalizers.NFD])
def test_composed_characters_are_the_same_text(normalizer: type) -> None:
    """The ohm and angstrom signs become an omega and an A with ring, as in Qwen2's tokenizer."""
    vocabulary = {letter: number for number, letter in enumerate("ΩÅA\u030a ")}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    inner.normalizer, inner.decoder = normalizer(), decoders.Fuse()
    inner.add_special_tokens(["</s>"])
    assert check(inner, "\u2126 \u212b").share == 0
    assert check(inner, "\u2126 Б").dropped == 1


def test_what_keeps_all_is_not_looked_through() -> None:
    assert byte_tokenizer().keeps_all
    assert train_bpe(["the cat"], 260).keeps_all
    assert not Tokenizer.from_json(letters().to_str()).keeps_all
    half = train_bpe(["the cat"], 260).to_json().replace(f'"{byte_symbols()[0]}"', '"lost"')
    assert not Tokenizer.from_json(half).keeps_all


def test_a_tokenizer_that_returns_the_text_passes() -> None:
    for inner in (letters(), unigram()):
        assert check(inner, "the cat sat.\n", "the  end, a\n\nb").share == 0


def test_characters_that_a_bpe_drops_are_counted_over_the_whole_text() -> None:
    texts = ["the cat sat on the mat.\n" * 60_000, *["the cat"] * 200, "a 猫 b"]
    losses = check(letters(), *texts)
    assert losses.dropped == 1
    assert losses.share >= 1 / sum(map(len, texts)) > 0
    assert "characters that the vocabulary lacks" in losses.describe()
    assert "'a 猫 b' comes back as 'a  b'" in losses.describe()


def test_half_a_character_is_lost_where_a_byte_is_missing() -> None:
    half = train_bpe(["the cat"], 260).to_json().replace(f'"{byte_symbols()[0xC3]}"', '"lost"')
    assert check(tokenizers.Tokenizer.from_str(half), "the cat", "café").dropped == 1


def test_unknown_tokens_are_counted() -> None:
    losses = check(bert(), "the cat sat.", "the dog sat.")
    assert losses.unknown == 1
    assert "1 of 8 tokens are unknown" in losses.describe()
    assert check(unigram(), "the cat", "the 猫").unknown == 1


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ("The Cat", "the cat", "letter case"),
        ("the\ncat", "the cat", "white space"),
        ("The\nCat", "the cat", "letter case and white space"),
        ("café x²", "cafe x2", "accents and compatibility characters"),
        ("abc", "ab", "characters"),
    ],
)
def test_what_is_lost_has_a_name(before: str, after: str, kind: str) -> None:
    assert kind_of_loss(before, after) == kind


def test_lower_case_is_a_loss_and_composition_is_none() -> None:
    inner = letters()
    inner.normalizer = normalizers.Lowercase()
    losses = check(inner, "The Cat")
    assert (losses.kinds - {"characters that the vocabulary lacks"}) == {"letter case"}
    composed = tokenizers.Tokenizer.from_str(train_bpe(["café"], 260).to_json())
    composed.normalizer = normalizers.NFC()
    assert check(composed, "cafe\u0301").share == 0


def test_an_encoding_by_chance_is_refused() -> None:
    dropout = Tokenizer.from_json(letters(dropout=0.1).to_str())
    with pytest.raises(DataError, match=r"encodes by chance \(BPE with dropout 0\.1\)"):
        check_chance(dropout)
    check_chance(Tokenizer.from_json(letters().to_str()))


class Dice(Tokenizer):
    """A tokenizer whose model says nothing of its chance."""

    turn = 0

    def encode(self, text: str) -> list[int]:
        self.turn += 1
        return [self.turn % 2]


def test_an_encoding_by_chance_is_found_by_trial() -> None:
    with pytest.raises(DataError, match="the same text gets other ids each time"):
        LossCheck(Dice(letters().to_str())).see(["ab"], [[0]])  # type: ignore[list-item]


def test_prepare_refuses_and_lossy_prepares(folder: Path, comm: MPI.Intracomm) -> None:
    if comm.rank == 0:
        (folder / "texts").mkdir()
        for number in range(12):
            (folder / "texts" / f"{number}.txt").write_text("你好世界" * 9 + f" abc {number}\n")
        (folder / "en.json").write_text(letters().to_str())
    comm.Barrier()
    options = PrepareOptions((str(folder / "texts"),), folder / "out", str(folder / "en.json"))
    with pytest.raises(DataError, match=r"the tokenizer en loses text: 0\.8.* --lossy") as caught:
        prepare(options, comm, Console(False))
    assert "你好" in str(caught.value)
    assert len(set(comm.allgather(str(caught.value)))) == 1
    comm.Barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["en.json", "texts"]
    comm.Barrier()
    said = io.StringIO()
    lossy = PrepareOptions(options.sources, options.out, options.tokenizer, lossy=True)
    prepare(lossy, comm, Console(comm.rank == 0, said))
    assert Manifest.load(folder / "out").prep["lossy"] is True
    assert comm.rank or "loses text" in said.getvalue()
    comm.Barrier()
