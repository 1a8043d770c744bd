"""Open the engine of a model on all ranks: rank 0 has it, the others follow."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.errors import UsageError
from mpillm.infer.serve.engine.batch_engine import BatchEngine
from mpillm.infer.serve.engine.page_pool import PagePool
from mpillm.infer.serve.engine.step_runner import StepRunner, check_served, page_bytes
from mpillm.infer.serve.load_served import load_served
from mpillm.infer.serve.plain_engine import PlainEngine
from mpillm.infer.serve.requests import TextEngine
from mpillm.machine.memory import read_memory
from mpillm.machine.node_map import map_nodes
from mpillm.models.part_module import PartModule
from mpillm.models.stacks.decoder_stack import Decoder
from mpillm.parallel.devices import choose_device
from mpillm.system.console import Console
from mpillm.tokens.chat.chat_template import ChatTemplate
from mpillm.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mpi4py import MPI

# A page is a unit of what texts share: smaller ones share more, and larger ones gather faster.
PAGE_TOKENS, MOST_CONTEXTS = 16, 8


@dataclass(frozen=True)
class EngineOptions:
    """How a model is spread over the ranks, and what it may hold."""

    tensor: int = 1
    pipeline: int = 1
    device: str = "auto"
    context: int | None = None
    """Tokens of a prompt and its text together; None: the model's."""
    queue: int = 256
    """Texts that wait at once."""
    cache_tokens: int | None = None
    """Of all texts that run; None: those of eight contexts, or of a quarter of the free memory."""


@dataclass(frozen=True)
class OpenedEngine:
    """An engine on this rank; `engine` is None where the rank follows."""

    engine: TextEngine | None
    tokenizer: Tokenizer
    template: ChatTemplate | None
    follow: Callable[[], None]
    """Compute what rank 0 plans, until it closes the engine; called on the other ranks."""

    @property
    def own(self) -> TextEngine:
        """The engine, on rank 0."""
        assert self.engine is not None
        return self.engine


def open_engine(
    trained: Path, options: EngineOptions, comm: "MPI.Intracomm", console: Console
) -> OpenedEngine:
    """Load a model and start its engine. Every rank calls it.

    Raises UsageError on all ranks for a context or a layout that the model does not have.
    """
    if options.tensor > 1 or options.pipeline > 1:
        raise UsageError(
            f"--tensor {options.tensor} and --pipeline {options.pipeline}: the engine computes on "
            "rank 0 alone; leave both out"
        )
    if comm.size > 1:
        console.warn(f"the engine computes on rank 0 alone: {comm.size - 1} more wait; start one")
    place, _ = choose_device(options.device, comm, map_nodes(comm), share=True, option="--device")
    loaded = load_served(trained, comm, console)
    spec = loaded.model.spec
    if options.context is not None and options.context > spec.context:
        raise UsageError(
            f"--context {options.context:,} is more than the {spec.context:,} tokens of the model; "
            "lower it"
        )
    if spec.source_field:
        raise UsageError(f"{trained} reads a source; serve a decoder, or an encoder of texts")
    engine = None
    if comm.rank == 0:
        engine = _start(loaded.model.to(place), options)
    return OpenedEngine(engine, loaded.tokenizer, loaded.template, lambda: None)


def _start(model: PartModule, options: EngineOptions) -> TextEngine:
    """Start the engine of a decoder, or of another model, whose texts are embedded one by one."""
    if not isinstance(model, Decoder):
        return PlainEngine(model, options.queue, options.context or 0)
    spec = check_served(model.spec)
    context = options.context or spec.context
    nbytes = page_bytes(spec, PAGE_TOKENS, next(model.parameters()).element_size())
    pages = -(-context // PAGE_TOKENS)
    if options.cache_tokens is None:
        free = read_memory().usable // 4 // nbytes
        pages = max(pages, min(MOST_CONTEXTS * pages, free))
    else:
        pages = max(pages, -(-options.cache_tokens // PAGE_TOKENS))
    pool, runner = PagePool(pages, PAGE_TOKENS), StepRunner(model, pages, PAGE_TOKENS)
    return BatchEngine(runner, pool, context, spec.vocab_size, options.queue)
