"""The preview: learnt tokens are marked, and a template of another tokenizer is refused."""

from io import StringIO

import pytest

from mpillm.errors import UsageError
from mpillm.system.console import Console
from mpillm.tokens.chat.chat_encoder import ChatEncoder
from mpillm.tokens.chat.chat_preview import check_template, print_example
from mpillm.tokens.tokenizer import byte_tokenizer
from tests.tokens.chat.templates import say, template, tokenizer


def printed(*texts: str, terminal: bool) -> str:
    stream = StringIO()
    tokens = ChatEncoder(tokenizer(), template("chatml")).tokens({"messages": say(*texts)})
    print_example(tokens, tokenizer(), Console(stream=stream, watched=terminal))
    return stream.getvalue()


def test_learnt_tokens_are_in_brackets_or_in_colour() -> None:
    assert "assistant\n[[Hello ä<|im_end|>]]" in printed("Hi", "Hello ä", terminal=False)
    coloured = printed("Hi", "Hello ä", terminal=True)
    assert "\x1b[1;32mHello ä<|im_end|>\x1b[0m" in coloured
    assert "[[" not in coloured


def test_the_middle_of_a_long_answer_is_left_out() -> None:
    text = printed("Hi", "Hello " * 900 + "end", terminal=False)
    assert "Hello  … " in text
    assert text.count("Hello") < 120
    assert "end<|im_end|>]]" in text


def test_a_template_of_another_tokenizer_is_refused() -> None:
    written = template("chatml").render(say("a <|x|> b", "c"))
    check_template(template("chatml"), written, "a <|x|> b", tokenizer())
    with pytest.raises(UsageError, match=r"writes <\|im_start\|>, <\|im_end\|>, which the token"):
        check_template(template("chatml"), written, "a <|x|> b", byte_tokenizer())
    other = template("mistral").render(say("a", "b"))
    with pytest.raises(UsageError, match="writes <s>, </s>, which"):
        check_template(template("mistral"), other, "", byte_tokenizer())
