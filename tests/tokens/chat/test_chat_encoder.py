"""Ids of conversations, and which of them are learnt."""

import numpy as np
import pytest

from mpillm.tokens.chat.chat_encoder import ChatEncoder, ChatTokens, learnt_part
from mpillm.tokens.chat.chat_preview import marked_parts
from mpillm.tokens.chat.chat_template import ChatTemplate
from mpillm.tokens.text.records import RecordError
from mpillm.tokens.tokenizer import byte_tokenizer
from tests.tokens.chat.templates import ENDS, NAMES, TOKENS, say, template, tokenizer


def encoded(name: str, *texts: str) -> ChatTokens:
    return ChatEncoder(tokenizer(), template(name)).tokens({"messages": say(*texts)})


@pytest.mark.parametrize("name", NAMES)
def test_the_learnt_tokens_are_the_answers_and_their_ends(name: str) -> None:
    tokens = encoded(name, "Hello there", "I am well.", "1, 2?", "3\n\n ä")
    learnt = [text for text, one in marked_parts(tokens, tokenizer()) if one]
    # Mistral's form has a space ahead of an answer, which a model writes.
    space = " " if name == "mistral" else ""
    assert learnt == [f"{space}{text}{ENDS[name]}" for text in ("I am well.", "3\n\n ä")]
    assert "".join(text for text, _ in marked_parts(tokens, tokenizer())) == template(name).render(
        say("Hello there", "I am well.", "1, 2?", "3\n\n ä")
    )
    # What a model is given before an answer is a prefix of the ids.
    prompt = template(name).render(say("Hello there"), prompt=True)
    ids = tokenizer().encode_rendered([prompt])[0][0]
    assert (tokens.ids[: len(ids)] == ids).all()
    assert not tokens.supervised[: len(ids)].any()


def test_what_follows_the_last_answer_is_cut_off() -> None:
    tokens = learnt_part(encoded("chatml", "Hi", "Hello.", "and what more?"))
    assert tokens.supervised[-1] == 1
    assert tokenizer().decode_rendered(tokens.ids).endswith("Hello.<|im_end|>")


def test_a_token_that_begins_in_the_prompt_is_not_learnt() -> None:
    # The answer's line end makes one token with that of the prompt.
    tokens = encoded("chatml", "Hi", "\n\nI am well.")
    first = next(text for text, one in marked_parts(tokens, tokenizer()) if one)
    assert first.lstrip("\n") == "I am well.<|im_end|>"


def test_a_token_across_the_border_of_an_answer_is_refused() -> None:
    joined = "{% for m in messages %}{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}"
    chat = {"messages": say("x", "Hello")}
    found = ChatEncoder(byte_tokenizer(), ChatTemplate(joined, TOKENS)).tokens(chat)
    assert bytes(found.ids[found.supervised == 1].astype(np.uint8)) == b"Hello<|im_end|>"
    # The tokenizer has a token "model", which begins with the template's letter.
    joined = joined.replace("{{ m.role }}", "\n m")
    with pytest.raises(RecordError, match="border is within the token"):
        ChatEncoder(tokenizer(), ChatTemplate(joined, TOKENS)).tokens(
            {"messages": say("x", "odel")}
        )


def test_of_a_text_all_is_learnt_but_its_first_token() -> None:
    tokens = ChatEncoder(tokenizer(), None).tokens({"text": "Hello there"})
    assert tokens.ids.tolist() == [*tokenizer().encode("Hello there"), tokenizer().eot_id]
    assert tokens.supervised.tolist() == [0] + [1] * (len(tokens.ids) - 1)
    with pytest.raises(RecordError, match=r"has no chat template; give one by\s+--chat-template"):
        ChatEncoder(tokenizer(), None).tokens({"messages": say("Hi", "Hello")})
