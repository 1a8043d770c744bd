"""Answers in what templates write: their words and their ends of turn, and nothing else."""

import pytest

from mpillm.tokens.chat.answer_spans import Rendering, SpanFinder, end_of_turn
from mpillm.tokens.chat.chat_template import ChatTemplate
from mpillm.tokens.text.records import RecordError
from tests.tokens.chat.templates import ENDS, NAMES, SPECIAL, TOKENS, say, template

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ä"}}}


def rendered(name: str, messages: list[dict[str, object]], **more: object) -> Rendering:
    return SpanFinder(template(name), SPECIAL).render(messages, **more)


def words(found: Rendering) -> list[str]:
    return [found.text[span.start : span.stop] for span in found.spans]


def refused(text: str, messages: list[dict[str, object]]) -> str:
    with pytest.raises(RecordError) as failure:
        SpanFinder(ChatTemplate(text, TOKENS, "t.jinja"), SPECIAL).render(messages)
    return str(failure.value)


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_words_and_the_end_of_each_turn_are_found(name: str) -> None:
    answers = ["Hello.", "user", "A text\n\nof two  paragraphs.", "Hello."]
    found = rendered(
        name, say("Hi", answers[0], "user", answers[1], "x", answers[2], "Hello.", "Hello.")
    )
    # Mistral's form has a space ahead of an answer, which a model writes.
    space = " " if name == "mistral" else ""
    assert words(found) == [space + answer + ENDS[name] for answer in answers]
    for span in found.spans:
        asked = found.text[: span.prompt]
        given = found.text[span.prompt : span.start]
        # Of Qwen, empty thoughts are ahead of an answer, which it is not given.
        assert asked + given == found.text[: span.start]
        assert given.strip() in ("", "<think>\n\n</think>")


@pytest.mark.parametrize("name", NAMES)
def test_the_end_of_a_turn_is_the_token_at_which_a_model_stops(name: str) -> None:
    assert end_of_turn(template(name), SPECIAL) == ENDS[name]


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_words_that_a_template_strips_are_found(name: str) -> None:
    assert words(rendered(name, say("Hi", "  Hello.\n"))) == ["Hello." + ENDS[name]]


def test_a_call_of_a_tool_is_learnt_as_the_template_writes_it() -> None:
    asked, answered = say("1 + ä?", "It is 1ä.")
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    messages = [asked, call, {"role": "tool", "content": "1ä"}, answered]
    expected = {
        "llama3": '{"name": "add", "parameters": {"a": 1, "b": "ä"}}<|eot_id|>',
        "qwen3": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ä"}}\n'
        "</tool_call><|im_end|>",
        # A template without calls gets them as words.
        "chatml": '{"name": "add", "arguments": {"a": 1, "b": "ä"}}<|im_end|>',
    }
    for name, text in expected.items():
        assert words(rendered(name, messages)) == [text, "It is 1ä." + ENDS[name]]


def test_thoughts_before_the_last_answer_are_learnt() -> None:
    found = rendered("qwen3", say("Hi", "<think>\nWell.\n</think>\n\nHello."))
    assert words(found) == ["<think>\nWell.\n</think>\n\nHello.<|im_end|>"]
    # The template leaves out those of an earlier turn, and what it writes is learnt.
    found = rendered("qwen3", say("Hi", "<think>\nWell.\n</think>\n\nHello.", "So?", "No."))
    assert words(found) == ["Hello.<|im_end|>", "No.<|im_end|>"]


def test_a_template_whose_answers_cannot_be_found_is_refused() -> None:
    chat = say("Hi", "Hello there")
    assert "changes its words: 'Hello there'" in refused(
        CHATML.replace("m.content", "m.content | upper"), chat
    )
    assert "is followed by no end of turn" in refused(
        "{% for m in messages %}{{ m.content }}{% endfor %}", chat
    )
    # The number of messages ahead of them all: a prompt has another one.
    assert "does not begin by what a model is given before: '1: …" in refused(
        "{{ messages | length }}: …" + CHATML, chat
    )
    assert "changes its words" in refused(CHATML.replace("m.content", "m.content * 2"), chat)


def test_a_template_without_special_tokens_ends_a_turn_by_its_visible_text() -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }} END\n\n{% endfor %}"
    found = SpanFinder(ChatTemplate(plain, {}), SPECIAL).render(say("Hi", "Hello", "x", "y"))
    assert words(found) == ["Hello END", "y END"]
    line = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    found = SpanFinder(ChatTemplate(line, {}), []).render(say("Hi", "Hello"))
    assert words(found) == ["Hello\n"]


def test_roles_that_do_not_alternate_are_refused_in_the_words_of_the_template() -> None:
    two = [*say("Hi", "Hello"), *say("x", "y")[1:]]
    for name in ("gemma", "mistral"):
        with pytest.raises(RecordError, match=r"is refused by .*\.jinja: Conversation roles must"):
            rendered(name, two)
    assert len(rendered("chatml", two).spans) == 2
