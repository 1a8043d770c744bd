"""Text from a model, token by token, with a key/value cache."""

from collections.abc import Iterable, Iterator

import torch

from mpillm.errors import UsageError
from mpillm.infer.decoding.token_rows import TokenRows, stream_tokens
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
    ids = tokenizer.encode(prompt)
    if model.spec.source_field:
        # As `prepare` encodes the sources of pairs.
        rows = tokenizer.encode_rows([prompt]) if tokenizer.closes_rows else []
        source = _source_of(model, rows[0][0].tolist() if rows else ids or [tokenizer.eot_id])
        start = first_token(model.spec, tokenizer.vocabulary, task or TaskSettings())
        tokens = sample_tokens(model, [start], sampling, source)
    else:
        tokens = sample_tokens(model, ids or [tokenizer.eot_id], sampling)
    yield from text_of(tokens, tokenizer, end_ids(tokenizer, bool(model.spec.source_field)))


def text_of(tokens: Iterable[int], tokenizer: Tokenizer, ends: frozenset[int]) -> Iterator[str]:
    """Yield pieces of the text of `tokens`, up to one of `ends`."""
    decoder = tokenizer.stream()
    for token in tokens:
        if token in ends:
            break
        yield decoder.push(token)
    yield decoder.finish()


def end_ids(tokenizer: Tokenizer, reads_source: bool) -> frozenset[int]:
    """Return the ids that end a text: the end of text and, of a target, what closes a row."""
    closes = reads_source and tokenizer.closes_rows
    closing = [int(tokenizer.encode_rows([""])[0][0][-1])] if closes else []
    return frozenset({tokenizer.eot_id, *closing})


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
    context, left = model.spec.context, sampling.max_tokens
    # No more of a long prompt than the model can see.
    seen = prompt[-context:]
    generator = torch.Generator().manual_seed(sampling.seed)
    while True:
        for token in stream_tokens(TokenRows(model, [seen], source), sampling, generator):
            yield token
            seen, left = [*seen, token], left - 1
            if not left:
                return
        if source is not None:
            return
        seen = seen[-(context // 2 or 1) :]
