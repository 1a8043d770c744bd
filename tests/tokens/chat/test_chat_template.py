"""Templates: the text that transformers writes, in a sandbox."""

import json
import pickle
from pathlib import Path

import pytest

from mpillm.errors import UsageError
from mpillm.tokens.chat.chat_template import ChatTemplate, find_template
from mpillm.tokens.text.records import RecordError
from tests.pretrained import peer
from tests.tokens.chat.templates import NAMES, TOKENS, say, template, tokenizer

HOSTILE = (
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ dict.__subclasses__() }}",
    "{{ namespace(__class__=1) }}",
    "{{ '%s' | format(raise_exception.__globals__) }}{{ raise_exception('no') }}",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_transformers_writes_the_same_text_and_ids(name: str, system: str, tmp_path: Path) -> None:
    transformers = peer("transformers")
    if system and name in ("gemma", "mistral"):
        pytest.skip("the template has no system message")
    (tmp_path / "tokenizer.json").write_text(tokenizer().to_json())
    text = template(name).text.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=text, **TOKENS
    )
    for number in range(20):
        turns = [f"Hello {turn * number} ä, <b>\n" + "x" * turn for turn in range(2 + number % 5)]
        messages = say(*turns, system=system)
        tools = [{"name": "f", "description": "ä < b"}] if number % 2 else None
        for prompt in (False, True):
            given = {"tools": tools, "add_generation_prompt": prompt}
            ours = template(name).render(messages, tools, prompt)
            assert ours == theirs.apply_chat_template(messages, tokenize=False, **given)
            ids = theirs.apply_chat_template(messages, return_dict=False, **given)
            assert tokenizer().encode_rendered([ours])[0][0].tolist() == ids


@pytest.mark.parametrize("text", HOSTILE)
def test_a_template_reaches_nothing_of_python(text: str) -> None:
    try:
        written = ChatTemplate(text, {}).render(say("Hi", "Hello"))
    except RecordError:
        return
    # Jinja's word for what a template may not see is empty.
    assert not written


def test_a_message_is_not_changed_by_a_template() -> None:
    messages = say("Hi", "Hello")
    with pytest.raises(RecordError, match="is refused by"):
        ChatTemplate("{{ messages[0].update(role='x') }}", {}).render(messages)
    assert messages == say("Hi", "Hello")


def test_what_is_no_template_is_refused() -> None:
    with pytest.raises(UsageError, match=r"t\.jinja is no chat template: .*endfor"):
        ChatTemplate("{% for m in messages %}", {}, "t.jinja")
    with pytest.raises(RecordError, match="has no attribute"):
        ChatTemplate("{{ messages[0].content.words[0].x.y }}", {}).render(say("Hi"))
    with pytest.raises(RecordError, match="TypeError"):
        ChatTemplate("{{ messages[0].content + 1 }}", {}).render(say("Hi"))


def test_a_generation_block_writes_what_it_holds() -> None:
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert ChatTemplate(text, {}).render(say("Hi", "Hello")) == "HiHello"


def test_the_template_of_a_folder_is_found_with_its_special_tokens(tmp_path: Path) -> None:
    texts_of = {1: "<s>", 2: "<|im_end|>"}
    assert find_template(tmp_path, None, texts_of, "</s>") is None
    assert find_template(None, None, {}, "") is None
    config = {"bos_token": {"content": "<bos>"}, "chat_template": "{{ bos_token }}a"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    found = find_template(tmp_path, None, texts_of, "</s>")
    assert found is not None
    assert (found.render([]), found.tokens["eos_token"]) == ("<bos>a", "<|im_end|>")
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    found = find_template(tmp_path, None, texts_of, "</s>")
    assert found is not None
    assert found.render([]) == "b"
    # A file of its own comes first, and one that an option names before all.
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}c")
    found = find_template(tmp_path, None, texts_of, "</s>")
    assert found is not None
    assert pickle.loads(pickle.dumps(found)).render([]) == "<s>c"
    (tmp_path / "own.jinja").write_text("d")
    found = find_template(tmp_path, tmp_path / "own.jinja", {}, "")
    assert found is not None
    assert found.render([]) == "d"
    with pytest.raises(UsageError, match="No such file"):
        find_template(tmp_path, tmp_path / "none.jinja", {}, "")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"cannot read .*tokenizer_config\.json"):
        find_template(tmp_path, None, {}, "")
