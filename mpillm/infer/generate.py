"""Text from a model, token by token, with a key/value cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mpillm.errors import CheckpointError, UsageError
from mpillm.infer.sampling import Sampling
from mpillm.models.part_module import Fields, PartModule
from mpillm.models.spec import ModelSpec
from mpillm.tasks.decoder_rows import start_id
from mpillm.tasks.task_catalog import TaskSettings
from mpillm.tasks.vocabulary import Vocabulary
from mpillm.tokens.tokenizer import Tokenizer


def generate(
    model: PartModule,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    task: TaskSettings | None = None,
) -> Iterator[str]:
    """Yield pieces of text that follow the prompt, until `max_tokens` or the end of the document.

    The same seed yields the same text. An empty prompt begins a new document. An encoder-decoder
    reads the prompt as its source, and yields until its context is full at most. `task`: what it
    was trained on. Raises UsageError where the source is too long, or is not text.
    """
    decoder, ids = tokenizer.stream(), tokenizer.encode(prompt)
    if model.spec.source_field:
        # As `prepare` encodes the sources of pairs.
        rows = tokenizer.encode_rows([prompt]) if tokenizer.closes_rows else []
        source = _source_of(model, rows[0][0].tolist() if rows else ids or [tokenizer.eot_id])
        start = first_token(model.spec, tokenizer.vocabulary, task or TaskSettings())
        tokens = sample_tokens(model, [start], sampling, source)
    else:
        tokens = sample_tokens(model, ids or [tokenizer.eot_id], sampling)
    for token in tokens:
        if token == tokenizer.eot_id:
            break
        yield decoder.push(token)
    yield decoder.finish()


def first_token(spec: ModelSpec, vocabulary: Vocabulary, task: TaskSettings) -> int:
    """Return the id that a decoder which reads a source begins with: of its task, its settings, or
    the padding token.
    """
    own = spec.start_token >= 0 and not task.start_token
    return spec.start_token if own else start_id(task, vocabulary)


def _source_of(model: PartModule, ids: list[int]) -> Fields:
    """Return the source of one row. Raises UsageError where the model does not read it."""
    spec = model.spec
    if spec.source_field != "source":
        raise UsageError(
            f"--prompt is text, and the model reads {spec.source_field} of sound; "
            "encode them with its encode_source, in Python"
        )
    if len(ids) > spec.source_context:
        raise UsageError(
            f"--prompt is a source of {len(ids)} tokens, and the model reads "
            f"{spec.source_context}; shorten it"
        )
    return {"source": torch.tensor([ids], device=next(model.parameters()).device)}


def sample_tokens(
    model: PartModule, prompt: list[int], sampling: Sampling, source: Fields | None = None
) -> Iterator[int]:
    """Yield `max_tokens` token ids that follow `prompt`.

    When the text exceeds the model's context, its older half is dropped and the cache is filled
    again. With a `source`, that of an encoder-decoder, the text ends there.
    """
    context = model.spec.context
    # No more of a long prompt than the model can see.
    seen = prompt[-context:]
    # Drawn on the CPU: a GPU's generator gives other numbers.
    generator = torch.Generator().manual_seed(sampling.seed)
    device = next(model.parameters()).device
    with torch.inference_mode():
        cache = model.make_cache(1) if source is None else model.encode_source(source)
    new = seen
    for _ in range(sampling.max_tokens):
        if cache.length + len(new) > context:
            if source is not None:
                return
            seen = seen[-(context // 2 or 1) :]
            cache, new = model.make_cache(1), seen
        with torch.inference_mode():
            logits_V = model.next_logits(torch.tensor([new], device=device), cache)[0, -1].cpu()
        token = draw_token(logits_V, sampling, generator)
        seen, new = [*seen, token], [token]
        yield token


def draw_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a token id: top-k, then top-p (nucleus sampling, Holtzman et al. 2020).

    Raises CheckpointError where the logits are not finite.
    """
    if not logits_V.isfinite().all():
        raise CheckpointError(
            "the model's outputs are NaN or infinite, so no token can be drawn: the run diverged; "
            "name an earlier checkpoint"
        )
    if sampling.greedy:
        return int(logits_V.argmax())
    # The largest becomes 0: divided by a small temperature the others may be -inf, none is NaN.
    logits_V = (logits_V.float() - logits_V.max()) / sampling.temperature
    if 0 < sampling.top_k < logits_V.numel():
        logits_V = logits_V.masked_fill(
            logits_V < logits_V.topk(sampling.top_k).values[-1], -torch.inf
        )
    probability_V = logits_V.softmax(0)
    if sampling.top_p < 1:
        sorted_V, order_V = probability_V.sort(descending=True)
        # A token is kept while the likelier ones do not fill the nucleus.
        outside_V = sorted_V.cumsum(0) - sorted_V >= sampling.top_p
        # One is kept always: a tiny nucleus is 0 in 32 bits.
        outside_V[0] = False
        probability_V = probability_V.index_fill(0, order_V[outside_V], 0.0)
    return int(torch.multinomial(probability_V, 1, generator=generator))
