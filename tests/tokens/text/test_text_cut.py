"""Texts without an end are cut for the tokenizer: no id changes where GPT-2's rule splits."""

import random

import pytest
import tokenizers
from mpi4py import MPI

from mpillm.tokens.text import text_cut
from mpillm.tokens.text.text_cut import TextCutter, training_parts
from mpillm.tokens.tokenizer import train_bpe

pytestmark = pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="no messages: serial pass only")

# Every kind of character that GPT-2's rule knows, and signs that no version of Python has to know.
SIGNS = [
    *"abzAZ09 \n\t.,;:'\"!?-_",
    "'s",
    "  ",
    "\n\n",
    " \n",
    "é",
    "中",
    "。",
    ",",
    "ア",
    "½",
    "Ⅷ",
]
SIGNS += ["\u0301", "😀", "\xa0", "\x1c", "\u2028", "\r\n", "٣", "\u200b"]


@pytest.fixture
def short(monkeypatch):
    """Cut after few characters, so that every place is tried."""
    monkeypatch.setattr(text_cut, "PART_CHARACTERS", 3)
    monkeypatch.setattr(text_cut, "LONGEST_PART", 40)


@pytest.mark.usefixtures("short")
def test_no_cut_of_any_text_changes_an_id() -> None:
    bpe = train_bpe(["a b c, z. 's 中。 \n\n  "] * 5, 300)
    library = tokenizers.Tokenizer.from_str(bpe.to_json())
    chance, cuts = random.Random(5), 0
    for _ in range(2000):
        text = "".join(chance.choices(SIGNS, k=chance.randint(1, 60)))
        parts = list(TextCutter(exact=True).parts([text]))
        cuts += len(parts) - 1
        if max(map(len, parts)) < 40:
            assert bpe.encode(text) == library.encode(text).ids, text
    assert cuts > 4000


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("exact", [True, False])
def test_the_parts_do_not_depend_on_the_blocks(exact: bool) -> None:
    chance = random.Random(6)
    for _ in range(300):
        text = "".join(chance.choices(["a" * 45, " ", "bc", "\n", ","], k=30))
        whole = list(TextCutter(exact).parts([text]))
        assert "".join(whole) == text
        assert max(map(len, whole)) <= 40
        size = chance.randint(1, 99)
        blocks = [text[start : start + size] for start in range(0, len(text), size)]
        assert list(TextCutter(exact).parts(blocks)) == whole


def test_a_line_without_a_space_is_cut_at_a_length_and_counted() -> None:
    longest = text_cut.LONGEST_PART
    cutter = TextCutter(exact=True)
    assert [len(part) for part in cutter.parts(["a" * (2 * longest + 5)])] == [longest, longest, 5]
    assert cutter.n_forced == 2
    assert list(cutter.parts([])) == list(cutter.parts([""])) == [""]


def test_a_tokenizer_of_another_rule_gets_texts_whole_up_to_the_longest_part() -> None:
    text = "word " * (text_cut.LONGEST_PART // 5)
    cutter = TextCutter(exact=False)
    assert list(cutter.parts([text])) == [text]
    assert (len(list(cutter.parts([text * 3]))), cutter.n_forced > 0) == (5, True)


def test_training_keeps_words_but_those_of_thousands_of_characters() -> None:
    text = "some words, and\n\nmore " * 999
    assert list(training_parts(text)) == [text]
    longest = text_cut.LONGEST_TRAINED_WORD
    assert [len(part) for part in training_parts("x" * (2 * longest + 3))] == [longest, longest, 3]
    assert train_bpe(["y" * 300_000 + " end"], 300).encode("yy")
