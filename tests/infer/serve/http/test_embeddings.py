"""POST /v1/embeddings by OpenAI's client, next to `embed_texts`."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import openai
import pytest

from mpillm.infer.sentence_embeddings import embed_texts
from mpillm.infer.serve.http.served_model import ServedModel
from mpillm.models.encoder import EncoderConfig
from mpillm.models.part_module import create
from mpillm.tokens.tokenizer import byte_tokenizer
from tests.fixtures.held_engine import HeldEngine
from tests.infer.serve.http.served import Server, serving

pytestmark = pytest.mark.usefixtures("processes")
TEXTS = ["a short text", "é", "another one, which is longer"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    spec = EncoderConfig(layers=2, width=32, heads=4, context=64, vocab_size=257)
    engine = HeldEngine(create(spec, 5).eval())
    with serving(ServedModel(("small",), engine, byte_tokenizer(), None, frozenset())) as found:
        yield found


def test_vectors_are_those_of_embed_texts(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    loaded = SimpleNamespace(model=server.engine._model, tokenizer=server.model.tokenizer)
    wanted = embed_texts(loaded, TEXTS)
    # The client itself asks for base64, and unpacks it.
    found = client.embeddings.create(model="small", input=TEXTS)
    assert np.allclose([each.embedding for each in found.data], wanted, atol=1e-6)
    assert [each.index for each in found.data] == [0, 1, 2]
    assert found.usage.prompt_tokens == sum(len(text.encode()) for text in TEXTS)
    as_floats = client.embeddings.create(
        model="small", input=TEXTS[0], encoding_format="float", dimensions=32
    )
    assert np.allclose(as_floats.data[0].embedding, wanted[0], atol=1e-6)
    ids = [list(text.encode()) for text in TEXTS]
    by_ids = client.embeddings.create(model="small", input=ids)
    assert np.allclose([each.embedding for each in by_ids.data], wanted, atol=1e-6)


def test_what_an_encoder_does_not_do(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="those of the model, 32"):
        client.embeddings.create(model="small", input="a", dimensions=16)
    with pytest.raises(openai.BadRequestError, match="65 tokens"):
        client.embeddings.create(model="small", input="a" * 65)
    with pytest.raises(openai.APIStatusError, match="does not continue text"):
        client.completions.create(model="small", prompt="a", max_tokens=2)
