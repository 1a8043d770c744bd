"""Load what is to be served: a run, one of its checkpoints, a Hugging Face folder, a GGUF file."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpillm.comm.failure import on_all, on_root
from mpillm.infer.chat_prompt import template_at
from mpillm.infer.import_model import as_published, texts_and_facts
from mpillm.infer.loading import TOKENIZER, check_trained, load_trained
from mpillm.infer.model_source import open_model
from mpillm.models.part_module import PartModule, build_without_values
from mpillm.models.spec import ModelSpec
from mpillm.system.console import Console
from mpillm.tokens.chat.chat_template import ChatTemplate, find_template
from mpillm.tokens.tokenizer import Tokenizer
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.finding import find
from mpillm.weights.open_source import open_source
from mpillm.weights.published_model import PublishedModel
from mpillm.weights.tensor_source import TensorSource

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class ServedWeights:
    """A model at rest, and what texts and conversations become for it."""

    spec: ModelSpec
    read: Callable[[str], torch.Tensor]
    """Return a weight of the whole model by its name. Raises CheckpointError."""
    whole: Callable[[], PartModule]
    """Load the whole model on this rank; every rank calls it."""
    tokenizer: Tokenizer
    template: ChatTemplate | None


def load_served(path: Path, comm: "MPI.Intracomm", console: Console) -> ServedWeights:
    """Open the model at `path`, for inference. Every rank calls it.

    Raises CheckpointError or MismatchError where nothing there can be served.
    """
    source = open_source(path, comm, console)
    if not isinstance(source, CheckpointSource):
        return _open_published(source, comm)
    checkpoint = find(path, comm, console, check_trained)
    model = open_model(CheckpointSource(checkpoint), comm, console)
    named = checkpoint.facts["tokenizer"]
    text = checkpoint.text(TOKENIZER)
    tokenizer = Tokenizer.from_json(text, named["name"], named["end_of_text"])
    return ServedWeights(
        model.spec,
        model.read,
        lambda: load_trained(path, comm, console).model,
        tokenizer,
        template_at(checkpoint, tokenizer),
    )


def _open_published(source: TensorSource, comm: "MPI.Intracomm") -> ServedWeights:
    published = on_all(comm, lambda: PublishedModel.open(as_published(source)))
    texts, facts = on_root(comm, lambda: texts_and_facts(source, published, None))
    named = facts["tokenizer"]
    tokenizer = Tokenizer.from_json(texts[TOKENIZER], named["name"], named["end_of_text"])
    return ServedWeights(
        published.spec,
        published.read,
        lambda: on_all(comm, lambda: _filled(published)),
        tokenizer,
        _template(texts, tokenizer),
    )


@torch.no_grad()
def _filled(published: PublishedModel) -> PartModule:
    model = build_without_values(published.spec)
    for name, weight in model.named_weights():
        weight.copy_(published.read(name))
    return model.eval()


def _template(texts: dict[str, str], tokenizer: Tokenizer) -> ChatTemplate | None:
    texts_of = {number: text for text, number in tokenizer.vocabulary.special.items()}
    # As the folder of an import has them; those of a GGUF file are in no folder yet.
    with tempfile.TemporaryDirectory(prefix="mpillm-") as folder:
        for name, text in texts.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return find_template(Path(folder), None, texts_of, tokenizer.end_of_text)
