"""Embeddings of texts: those of each text alone, and those of a published model in transformers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpillm.errors import UsageError
from mpillm.infer.import_model import import_model
from mpillm.infer.loading import Loaded, load_trained
from mpillm.infer.sentence_embeddings import embed_texts
from mpillm.models.encoder import EncoderConfig
from mpillm.models.model_catalog import named_shapes
from mpillm.models.part_module import create
from mpillm.system.console import Console
from tests.pretrained import minilm, peer
from tests.published import SPEC, publish

pytest.importorskip("safetensors.torch")
QUIET = Console(speaks=False)
ENCODER = EncoderConfig(
    layers=2,
    width=32,
    heads=4,
    context=20,
    vocab_size=300,
    token_types=2,
    head="none",
    head_layer="tanh",
)
TEXTS = ["a", "the cat sat on the mat", "", "one long text that the context does not hold", "cat"]
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A fast fox leaps across a sleepy hound.",
    "MPI ranks exchange messages over shared memory.",
    "Naïve café owners in Zürich pay 3,50 €.",
    "pipeline",
    "Gradients are summed in one fixed order, so the loss is bitwise the same in any layout. " * 4,
    "",
]


@pytest.fixture
def embedder(folder: Path, comm: MPI.Intracomm) -> Loaded:
    if comm.rank == 0:
        publish(folder / "published", ENCODER)
    comm.Barrier()
    import_model(folder / "published", folder / "imported", comm, QUIET)
    return load_trained(folder / "imported", comm, QUIET)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_a_text_has_the_same_embedding_in_any_batch(embedder: Loaded, pooling: str) -> None:
    found = embed_texts(embedder, TEXTS, pooling)
    assert found.shape == (5, 32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    for number, text in enumerate(TEXTS):
        alone = embed_texts(embedder, [text], pooling)[0]
        np.testing.assert_allclose(found[number], alone, rtol=1e-3, atol=1e-5)
    ids = torch.tensor([embedder.tokenizer.encode(TEXTS[1])[:20]])
    (states, *_) = embedder.model.forward_part({"ids": ids}, ()).outputs
    state = {"mean": states.mean(1), "first": states[:, 0], "last": states[:, -1]}[pooling][0]
    plain = embed_texts(embedder, TEXTS, pooling, normalised=False)[1]
    np.testing.assert_allclose(plain, state.detach().numpy(), rtol=1e-3, atol=1e-5)


def test_no_texts_and_what_embeds_none(embedder: Loaded, folder: Path, comm: MPI.Intracomm) -> None:
    assert embed_texts(embedder, []).shape[0] == 0
    with pytest.raises(UsageError, match="pooling = 'max' is none of first, mean, last"):
        embed_texts(embedder, TEXTS, "max")
    if comm.rank == 0:
        publish(folder / "decoder", SPEC)
    comm.Barrier()
    import_model(folder / "decoder", folder / "other", comm, QUIET)
    with pytest.raises(UsageError, match="architecture 'decoder' embeds no text"):
        embed_texts(load_trained(folder / "other", comm, QUIET), TEXTS)
    pictures = create(named_shapes()["vit-tiny-digits"].replace(classes=2), 1)
    with pytest.raises(UsageError, match="the model reads pixels and embeds no text"):
        embed_texts(replace(embedder, model=pictures), TEXTS)


def test_those_of_minilm_are_transformers(folder: Path, comm: MPI.Intracomm) -> None:
    transformers, published = peer("transformers"), minilm()
    import_model(published, folder / "minilm", comm, QUIET)
    loaded = load_trained(folder / "minilm", comm, QUIET)
    # [SEP] ends a text of a model that names no other end.
    assert loaded.tokenizer.end_of_text == "[SEP]"
    found = embed_texts(loaded, SENTENCES)
    tokenizer = transformers.AutoTokenizer.from_pretrained(published)
    theirs = transformers.AutoModel.from_pretrained(published).float().eval()
    given = tokenizer(SENTENCES, padding=True, truncation=True, max_length=512, return_tensors="pt")
    with torch.no_grad():
        states = theirs(**given).last_hidden_state
    mask = given["attention_mask"][..., None]
    wanted = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    assert ((found * wanted).sum(1) >= 0.99999).all()
    # Sentences of one meaning are nearer than others.
    nearness = found @ found.T
    assert nearness[0, 1] > nearness[0, 2] + 0.3
    assert json.loads(loaded.checkpoint.text("config.json"))["architectures"] == ["BertModel"]
