"""Open the engine of a model on all ranks: rank 0 has it, the others follow."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpillm.comm.failure import on_all
from mpillm.errors import LayoutError, UsageError
from mpillm.infer.serve.engine.batch_engine import BatchEngine, Runner
from mpillm.infer.serve.engine.page_pool import PagePool
from mpillm.infer.serve.engine.spread_runner import ANY_BATCH, SpreadRunner
from mpillm.infer.serve.engine.step_runner import StepRunner, check_served, page_bytes
from mpillm.infer.serve.load_served import ServedWeights, load_served
from mpillm.infer.serve.plain_engine import PlainEngine
from mpillm.infer.serve.requests import TextEngine
from mpillm.machine.memory import read_memory
from mpillm.machine.node_map import map_nodes
from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.stored.packed_linear import pack_linears
from mpillm.models.part_module import PartModule
from mpillm.models.spec import ModelSpec
from mpillm.models.stacks.decoder_stack import Decoder
from mpillm.parallel.devices import choose_device
from mpillm.parallel.precision import torch_dtype
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import mesh_order
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

    tensor: int = 0
    """Ranks that share each layer; 0: as many as can."""
    pipeline: int = 0
    """Ranks that have some layers each; 0: as many as the tensor axis leaves."""
    device: str = "auto"
    context: int | None = None
    """Tokens of a prompt and its text together; None: the model's."""
    queue: int = 256
    """Texts that wait at once."""
    dtype: str = "float32"
    """Of weights and activations: float32 or bfloat16."""
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

    Raises UsageError and LayoutError on all ranks for a context or a layout that the model does not
    have.
    """
    place, _ = choose_device(options.device, comm, map_nodes(comm), share=True, option="--device")
    if comm.size > 1 and place != "cpu":
        raise LayoutError("ranks share a served model on CPUs alone; take --device cpu, or one GPU")
    served = load_served(trained, comm, console)
    spec = served.spec
    if options.context is not None and options.context > spec.context:
        raise UsageError(
            f"--context {options.context:,} is more than the {spec.context:,} tokens of the model; "
            "lower it"
        )
    if spec.source_field:
        raise UsageError(f"{trained} reads a source; serve a decoder, or an encoder of texts")
    options = _with_layout(options, spec, comm.size)
    follow: Callable[[], None] = _nothing
    if comm.size > 1:
        engine, follow = _spread(served, options, comm)
    else:
        engine = start_alone(served.whole().to(place), options)
    return OpenedEngine(engine, served.tokenizer, served.template, follow)


def _with_layout(options: EngineOptions, spec: ModelSpec, ranks: int) -> EngineOptions:
    """Return the options with both axes, the largest tensor axis that is legal. Raises LayoutError
    where no layout has `ranks` ranks.
    """
    for tensor in [options.tensor] if options.tensor else range(ranks, 0, -1):
        pipeline = options.pipeline or ranks // tensor
        if tensor * pipeline == ranks and _is_legal(spec, tensor, pipeline):
            return replace(options, tensor=tensor, pipeline=pipeline)
    asked = f"--tensor {options.tensor or 'any'} × --pipeline {options.pipeline or 'any'}"
    heads = f"{spec.heads} heads" if isinstance(spec, DecoderConfig) else "its heads"
    raise LayoutError(
        f"{asked} cannot be {ranks} ranks, those of the job, for this model: the tensor axis "
        f"divides {heads}, and the pipeline has {spec.blocks} ranks at most; start with "
        "another -n, or change them"
    )


def _is_legal(spec: ModelSpec, tensor: int, pipeline: int) -> bool:
    if tensor * pipeline == 1:
        return True
    try:
        mesh_order(
            ParallelSettings(data=1, pipeline=pipeline, tensor=tensor),
            tensor * pipeline,
            spec,
            ANY_BATCH,
        )
    except LayoutError:
        return False
    return pipeline <= spec.blocks


def start_alone(model: PartModule, options: EngineOptions) -> TextEngine:
    """Start the engine of a decoder, or of another model, whose texts are embedded one by one."""
    if not isinstance(model, Decoder):
        return PlainEngine(model, options.queue, options.context or 0)
    spec = check_served(model.spec)
    if options.dtype != "float32":
        model = model.to(torch_dtype(options.dtype))
    pack_linears(model)
    pages = _pages(spec, options, next(model.parameters()).device)
    return _engine(StepRunner(model, pages, PAGE_TOKENS), pages, spec, options)


def _spread(
    served: ServedWeights, options: EngineOptions, comm: "MPI.Intracomm"
) -> tuple[TextEngine | None, Callable[[], None]]:
    """Share the model between the ranks; start the engine on rank 0."""
    spec = check_served(served.spec)
    # The same on all ranks: the scarcest decides.
    own = on_all(comm, lambda: _pages(spec, options, shared_by=comm.size))
    pages: int = min(comm.allgather(own))
    sizes = options.pipeline, options.tensor
    dtype = torch_dtype(options.dtype)
    runner = SpreadRunner(spec, served.read, comm, sizes, pages, PAGE_TOKENS, dtype)
    if comm.rank:
        return None, runner.follow
    return _engine(runner, pages, spec, options), _nothing


def _engine(runner: Runner, pages: int, spec: DecoderConfig, options: EngineOptions) -> TextEngine:
    context = options.context or spec.context
    pool = PagePool(pages, PAGE_TOKENS)
    return BatchEngine(runner, pool, context, spec.vocab_size, options.queue)


def _pages(
    spec: DecoderConfig,
    options: EngineOptions,
    device: torch.device | None = None,
    shared_by: int = 1,
) -> int:
    """Return how many pages the texts of all clients have: those of one context at least.

    `shared_by`: ranks that have some heads or layers of a page each. Raises UsageError where the
    pages that were asked for are more than the memory.
    """
    least = -(-(options.context or spec.context) // PAGE_TOKENS)
    free_bytes = read_memory().usable
    if device is not None and device.type == "cuda":
        # The weights are there already.
        free_bytes, _ = torch.cuda.mem_get_info(device)
    own_bytes = page_bytes(spec, PAGE_TOKENS, torch_dtype(options.dtype).itemsize)
    if options.cache_tokens is not None:
        wanted = max(least, -(-options.cache_tokens // PAGE_TOKENS))
        # 0: the host does not say.
        if 0 < free_bytes < wanted * own_bytes // shared_by:
            most = free_bytes * shared_by // own_bytes * PAGE_TOKENS
            raise UsageError(
                f"--cache-tokens {options.cache_tokens:,} needs {wanted * own_bytes:,} bytes, and "
                f"there is memory for {most:,} tokens; lower it, or leave it out"
            )
        return wanted
    return max(least, min(MOST_CONTEXTS * least, free_bytes // 4 // own_bytes))


def _nothing() -> None:
    """Follow nobody: the rank computes alone."""
