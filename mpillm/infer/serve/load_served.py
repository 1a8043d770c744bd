"""Load what is to be served: a run, one of its checkpoints, a Hugging Face folder, a GGUF file."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpillm.comm.failure import on_all, on_root
from mpillm.infer.chat_prompt import template_of
from mpillm.infer.import_model import as_published, texts_and_facts
from mpillm.infer.loading import TOKENIZER, load_trained
from mpillm.models.part_module import PartModule
from mpillm.system.console import Console
from mpillm.tokens.chat.chat_template import ChatTemplate, find_template
from mpillm.tokens.tokenizer import Tokenizer
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.open_source import open_source
from mpillm.weights.published_model import PublishedModel
from mpillm.weights.tensor_source import TensorSource

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class ServedWeights:
    """A whole model, and what texts and conversations become for it."""

    model: PartModule
    tokenizer: Tokenizer
    template: ChatTemplate | None


def load_served(path: Path, comm: "MPI.Intracomm", console: Console) -> ServedWeights:
    """Load the model at `path`, for inference. Every rank calls it.

    Raises CheckpointError or MismatchError where nothing there can be served.
    """
    source = open_source(path, comm, console)
    if isinstance(source, CheckpointSource):
        loaded = load_trained(path, comm, console)
        return ServedWeights(loaded.model, loaded.tokenizer, template_of(loaded))
    return _load_published(source, comm)


def _load_published(source: TensorSource, comm: "MPI.Intracomm") -> ServedWeights:
    published = on_all(comm, lambda: PublishedModel.open(as_published(source)))
    texts, facts = on_root(comm, lambda: texts_and_facts(source, published, None))
    named = facts["tokenizer"]
    tokenizer = Tokenizer.from_json(texts[TOKENIZER], named["name"], named["end_of_text"])
    model = on_all(comm, lambda: _filled(published))
    return ServedWeights(model.eval(), tokenizer, _template(texts, tokenizer))


@torch.no_grad()
def _filled(published: PublishedModel) -> PartModule:
    model = published.spec.build()
    for name, weight in model.named_weights():
        weight.copy_(published.read(name))
    return model


def _template(texts: dict[str, str], tokenizer: Tokenizer) -> ChatTemplate | None:
    texts_of = {number: text for text, number in tokenizer.vocabulary.special.items()}
    # As the folder of an import has them; those of a GGUF file are in no folder yet.
    with tempfile.TemporaryDirectory(prefix="mpillm-") as folder:
        for name, text in texts.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return find_template(Path(folder), None, texts_of, tokenizer.end_of_text)
