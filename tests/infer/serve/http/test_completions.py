"""POST /v1/completions by OpenAI's own client, against `mpillm generate` and plain logits."""

import asyncio
from collections.abc import Iterator

import openai
import pytest
import torch

from mpillm.infer.generate import generate
from mpillm.infer.sampling import Sampling
from tests.infer.serve.http.served import Server, serving

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def generated(server: Server, prompt: str, sampling: Sampling) -> str:
    """Write the text of `mpillm generate`."""
    return "".join(generate(server.engine._model, server.model.tokenizer, prompt, sampling))


def logprobs_of(server: Server, ids: list[int]) -> torch.Tensor:
    """Compute the log-probabilities (T, V) of what follows each of `ids`."""
    with torch.inference_mode():
        return server.engine._model(torch.tensor([ids]))[0].double().log_softmax(-1)


def test_a_text_is_that_of_generate(server: Server, client: openai.OpenAI) -> None:
    for temperature, seed in ((0.0, 0), (0.9, 5)):
        found = client.completions.create(
            model="tiny", prompt="def ", max_tokens=24, temperature=temperature, seed=seed
        )
        wanted = Sampling(24, temperature, 0, 1.0, seed)
        assert found.choices[0].text == generated(server, "def ", wanted)
    assert found.usage
    assert found.usage.prompt_tokens == 4
    assert found.usage.total_tokens == found.usage.completion_tokens + 4
    assert [each.id for each in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"


def test_a_stream_is_the_same_text_in_pieces(server: Server, client: openai.OpenAI) -> None:
    asked = {
        "model": "tiny",
        "prompt": ["x = ", "y = "],
        "max_tokens": 20,
        "seed": 3,
        "logprobs": 1,
    }
    whole = client.completions.create(**asked)
    options = {"include_usage": True}
    chunks = list(client.completions.create(**asked, stream=True, stream_options=options))
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(each.text for each in own) == choice.text
        assert [t for each in own for t in each.logprobs.tokens] == choice.logprobs.tokens
        assert [each.finish_reason for each in own][-1] == choice.finish_reason
        assert not any(each.finish_reason for each in own[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_echo_with_logprobs_scores_a_prompt(server: Server, client: openai.OpenAI) -> None:
    """As lm-eval's client asks, and counts: one token more than those of the prompt."""
    rows = [[100, 101, 102, 32], [97, 98, 195, 169]]
    found = client.completions.create(
        model="tiny", prompt=rows, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    for ids, choice in zip(rows, found.choices, strict=True):
        logprobs_TV = logprobs_of(server, ids)
        listed = choice.logprobs
        assert len(listed.tokens) == len(listed.token_logprobs) == len(listed.top_logprobs) == 5
        assert listed.token_logprobs[0] is listed.top_logprobs[0] is None
        wanted = [float(logprobs_TV[place, ids[place + 1]]) for place in range(3)]
        assert listed.token_logprobs[1:4] == pytest.approx(wanted, abs=1e-5)
        for place in range(3):
            likeliest = max(listed.top_logprobs[place + 1].values())
            assert likeliest == pytest.approx(float(logprobs_TV[place].max()), abs=1e-5)
        assert choice.text.startswith(bytes(ids).decode())
    # Both bytes of é begin where it does.
    assert found.choices[1].logprobs.text_offset[:4] == [0, 1, 2, 2]
    assert found.choices[1].logprobs.tokens[2:4] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_the_token_that_ends_a_scored_prompt_is_listed(
    server: Server, client: openai.OpenAI
) -> None:
    end = server.model.tokenizer.eot_id
    asked = {"model": "tiny", "prompt": "abc", "logit_bias": {str(end): 100}, "max_tokens": 1}
    found = client.completions.create(**asked, echo=True, logprobs=1)
    assert found.choices[0].finish_reason == "stop"
    assert len(found.choices[0].logprobs.token_logprobs) == 4
    assert found.choices[0].text == "abc"
    assert found.usage.completion_tokens == 0
    plain = client.completions.create(**asked, logprobs=1)
    assert plain.choices[0].finish_reason == "stop"
    assert plain.choices[0].logprobs.tokens == []


def test_a_prompt_alone(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="tiny", prompt="alone", max_tokens=0, echo=True, logprobs=0
    )
    assert found.choices[0].text == "alone"
    assert found.choices[0].finish_reason == "length"
    assert len(found.choices[0].logprobs.tokens) == 5
    assert found.usage.completion_tokens == 0
    # A new document begins, without the name of the token that begins it.
    empty = client.completions.create(model="tiny", prompt="", max_tokens=0, echo=True)
    assert (empty.choices[0].text, empty.usage.prompt_tokens) == ("", 1)


def test_stop_strings_bias_and_choices(server: Server, client: openai.OpenAI) -> None:
    letter = ord("z")
    asked = {"model": "tiny", "prompt": "q", "max_tokens": 12, "temperature": 0}
    biased = client.completions.create(**asked, logit_bias={letter: 100})
    assert biased.choices[0].text == "z" * 12
    stopped = client.completions.create(**asked, logit_bias={letter: 100}, stop=["y", "zzz"])
    assert stopped.choices[0].text == ""
    assert stopped.choices[0].finish_reason == "stop"
    several = client.completions.create(model="tiny", prompt="q", max_tokens=12, n=3, seed=7)
    alone = [
        client.completions.create(model="tiny", prompt="q", max_tokens=12, seed=7 + number)
        for number in range(3)
    ]
    assert [each.text for each in several.choices] == [each.choices[0].text for each in alone]
    assert several.usage.prompt_tokens == 1
    assert several.usage.completion_tokens == sum(a.usage.completion_tokens for a in alone)


def test_the_best_of_several_is_the_likeliest(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "q", "max_tokens": 6, "seed": 11, "logprobs": 0}
    each = client.completions.create(**asked, n=4)
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.tokens) for c in each.choices]
    best = client.completions.create(**asked, best_of=4)
    [choice] = best.choices
    assert choice.text == each.choices[means.index(max(means))].text
    assert best.usage == each.usage


def test_many_at_once_by_the_asynchronous_client(server: Server) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            asked = [
                client.completions.create(
                    model="tiny", prompt=f"{number}: ", max_tokens=8, temperature=0
                )
                for number in range(8)
            ]
            stream = await client.completions.create(
                model="tiny", prompt="0: ", max_tokens=8, temperature=0, stream=True
            )
            streamed = "".join([chunk.choices[0].text async for chunk in stream])
            found = [each.choices[0].text for each in await asyncio.gather(*asked)]
            assert streamed == found[0]
            return found

    greedy = Sampling(8, 0.0)
    assert asyncio.run(ask()) == [generated(server, f"{n}: ", greedy) for n in range(8)]
