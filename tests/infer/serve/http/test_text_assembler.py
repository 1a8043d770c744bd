"""Stop strings over the borders of tokens, and characters over the borders of tokens."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.infer.serve.http.text_assembler import TextAssembler
from mpillm.infer.serve.requests import TokenLogprob
from mpillm.tokens.tokenizer import byte_tokenizer

TOKENS = byte_tokenizer()


def assembled(text: bytes, stops: list[str]) -> tuple[list[str], list[int], TextAssembler]:
    """Push the bytes; return the pieces, and the tokens whose log-probabilities came."""
    assembler = TextAssembler(TOKENS.stream(), stops)
    pieces, places = [], []
    for byte in text:
        found = assembler.push(byte, TokenLogprob(byte, -1.0))
        pieces.append(found.text)
        places += [each.place for each in found.logprobs]
        if assembler.stopped:
            break
    found = assembler.finish()
    return [*pieces, found.text], [*places, *(each.place for each in found.logprobs)], assembler


@settings(max_examples=200, deadline=None)
@given(st.text("abé€", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_ahead_of_the_first_stop_string(text: str, stops: list[str]) -> None:
    pieces, places, assembler = assembled(text.encode(), stops)
    # The stop string that is whole first wins; of two at once, the one that begins earlier.
    ends = [
        min(text.index(stop) for stop in stops if stop in text[:length])
        for length in range(1, len(text) + 1)
        if any(stop in text[:length] for stop in stops)
    ]
    wanted = text[: ends[0]] if ends else text
    assert "".join(pieces) == wanted
    assert assembler.stopped == bool(ends)
    assert places == sorted(places)
    if not ends:
        assert len(places) == len(text.encode())
    assert all(place <= len(wanted) for place in places)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    pieces, places, _ = assembled(b"one\n\ntwo", ["\n\n"])
    assert pieces == ["o", "n", "e", "", "", ""]
    # The tokens of the stop string have no log-probabilities either.
    assert places == [0, 1, 2]
    pieces, _, assembler = assembled(b"a\nb", ["\n\n"])
    assert pieces == ["a", "", "\nb", ""]
    assert not assembler.stopped


def test_a_character_comes_with_its_last_byte() -> None:
    pieces, places, _ = assembled("a€b".encode(), [])
    assert pieces == ["a", "", "", "€", "b", ""]
    assert places == [0, 1, 1, 1, 2]
    # Half of a character at the end becomes U+FFFD.
    assert "".join(assembled("é".encode()[:1], ["x"])[0]) == "\ufffd"


def test_a_stop_string_held_at_the_end_is_text() -> None:
    assert "".join(assembled(b"done#", ["##"])[0]) == "done#"
