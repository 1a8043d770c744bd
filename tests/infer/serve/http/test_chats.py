"""POST /v1/chat/completions by OpenAI's client: the template, streams, schemas."""

import json
from collections.abc import Iterator

import openai
import pytest

from mpillm.infer.generate import sample_tokens, text_of
from mpillm.infer.sampling import Sampling
from tests.infer.serve.http.served import Server, serving, tiny_model

pytestmark = pytest.mark.usefixtures("processes")
ASKED = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hé"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_an_answer_follows_the_template(server: Server, client: openai.OpenAI) -> None:
    model = server.model
    ids = model.chat_prompt(ASKED)
    special = model.tokenizer.vocabulary.special
    assert ids[0] == special["<|im_start|>"]
    assert model.end_ids == {special["<|im_end|>"], special["<|endoftext|>"]}
    sampling = Sampling(16, 0.0)
    tokens = sample_tokens(server.engine._model, ids, sampling)
    wanted = "".join(text_of(tokens, model.tokenizer, model.end_ids))
    asked = {"model": "tiny", "messages": ASKED, "temperature": 0, "max_tokens": 16}
    found = client.chat.completions.create(**asked)
    assert found.choices[0].message.content == wanted
    assert found.usage.prompt_tokens == len(ids)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == wanted
    assert chunks[-1].choices[0].finish_reason == "length"
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "é"}]
    developer = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    again = client.chat.completions.create(**asked | {"messages": developer})
    assert again.choices[0].message.content == wanted


def test_without_a_bound_the_answer_fills_the_context(
    server: Server, client: openai.OpenAI
) -> None:
    ends = dict.fromkeys(map(str, server.model.end_ids), -100)
    found = client.chat.completions.create(model="tiny", messages=ASKED, logit_bias=ends)
    assert found.usage.total_tokens == server.model.context
    assert found.choices[0].finish_reason == "length"


def test_logprobs_have_bytes(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=5, logprobs=True, top_logprobs=3, n=2, seed=1
    )
    for choice in found.choices:
        for each in choice.logprobs.content:
            assert len(each.top_logprobs) == 3
            assert each.logprob <= each.top_logprobs[0].logprob
            assert bytes(each.bytes).decode("utf-8", "replace") == each.token


def test_a_schema_holds_the_answer(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["a", "b"]}, "count": {"type": "integer", "maximum": 9}},
        "required": ["name", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "pair", "schema": schema}}
    found = client.chat.completions.create(
        model="tiny", messages=ASKED, response_format=form, n=3, seed=2, max_tokens=120
    )
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content)
        assert value.keys() == {"name", "count"}
        assert value["name"] in ("a", "b")
    any_object = client.chat.completions.create(
        model="tiny", messages=ASKED, response_format={"type": "json_object"}, max_tokens=20, seed=4
    )
    assert any_object.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "foo"}},
                }
            },
            "response_format",
        ),
        ({"max_tokens": 1000}, "max_tokens"),
    ],
)
def test_wrong_fields_are_named(client: openai.OpenAI, more: dict, param: str) -> None:
    asked = {"model": "tiny", "messages": ASKED} | more
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(**asked)
    assert found.value.param == param


def test_a_model_without_a_template_says_so() -> None:
    with serving(tiny_model(chats=False)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model="tiny", messages=ASKED)
