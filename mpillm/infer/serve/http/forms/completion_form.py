"""The body of POST /v1/completions: prompts as texts or tokens, and what is asked of each."""

from dataclasses import dataclass, replace
from typing import Any

from mpillm.infer.serve.http.forms.answer_settings import (
    IGNORED,
    MOST_CHOICES,
    AnswerSettings,
    read_answer_settings,
    room_for,
)
from mpillm.infer.serve.http.forms.api_error import wrong_field
from mpillm.infer.serve.http.forms.body_fields import (
    BodyFields,
    check_integer,
    check_text,
    wrong_type,
)
from mpillm.infer.serve.http.served_model import ServedModel
from mpillm.infer.serve.requests import TextRequest

USUAL_TOKENS = 16
"""OpenAI's default of `max_tokens`."""
MOST_LOGPROBS = 20
MOST_TEXTS = 256
"""Prompts × `best_of` of a request: each waits in the engine's queue."""
# Its ids, and its text where it was given as one.
Prompt = tuple[tuple[int, ...], str | None]


@dataclass(frozen=True)
class CompletionForm:
    """What a client asks for: a request a text, those of one prompt after each other."""

    settings: AnswerSettings
    requests: tuple[TextRequest, ...]
    prompts: tuple[str, ...]
    """The texts of the prompts, for `echo`."""
    echo: bool
    logprobs: int | None
    best_of: int
    """Texts of a prompt, of which the `settings.n` likeliest are returned."""
    lists_end: bool
    """Whether the log-probability of the token that ends a text is listed.

    A client that scores prompts by `echo` counts on one token more than the prompt's.
    """


def read_completion(body: BodyFields, model: ServedModel) -> CompletionForm:
    """Read and check a body. Raises ApiError, which names the field at fault."""
    model.check_name(body.value("model"))
    prompts = _prompts(body.value("prompt"), model)
    settings = read_answer_settings(body, model.vocab_size)
    echo, logprobs = body.flag("echo"), body.integer("logprobs", 0, MOST_LOGPROBS)
    if body.text("suffix"):
        raise wrong_field("suffix", "is not supported: the model writes what follows a prompt")
    best_of = body.integer("best_of", 1, MOST_CHOICES, settings.n) or settings.n
    _check_counts(settings, best_of, len(prompts), echo)
    body.refuse_others(IGNORED)
    lists_end = echo and logprobs is not None
    shown = logprobs if best_of == settings.n else logprobs or 0
    requests = []
    for ids, _ in prompts:
        most = room_for(len(ids), settings.max_tokens, USUAL_TOKENS, model.context, "max_tokens")
        # The prompt alone: the token that is drawn is not reported (completion_answers.py).
        plain = TextRequest(
            prompt=ids,
            sampling=settings.sampling(max(1, most), 0),
            end_ids=frozenset() if lists_end else model.end_ids,
            bias=settings.bias,
            top_logprobs=shown,
            prompt_logprobs=lists_end,
        )
        requests += [
            replace(plain, sampling=settings.sampling(max(1, most), choice))
            for choice in range(best_of)
        ]
    texts = tuple(model.text_of(ids) if text is None else text for ids, text in prompts)
    return CompletionForm(settings, tuple(requests), texts, echo, logprobs, best_of, lists_end)


def _check_counts(settings: AnswerSettings, best_of: int, prompts: int, echo: bool) -> None:
    if best_of < settings.n:
        raise wrong_field("best_of", f"is {best_of}, less than n = {settings.n}; raise it")
    if best_of > settings.n and settings.stream:
        raise wrong_field("best_of", "compares whole texts, which a stream cannot wait for")
    if prompts * best_of > MOST_TEXTS:
        raise wrong_field(
            "prompt",
            f"and best_of ask for {prompts:,} × {best_of:,} texts, and at most {MOST_TEXTS} are "
            "taken; send several requests",
        )
    if settings.max_tokens == 0 and not echo:
        raise wrong_field("max_tokens", "is 0: no token is asked for; give 1, or echo: true")


def _prompts(value: Any, model: ServedModel) -> list[Prompt]:
    """Return the ids of each prompt. Without any, a new document begins."""
    if value is None or isinstance(value, str):
        return [_text(value or "", model)]
    if not isinstance(value, list):
        raise wrong_type("prompt", "a text, a list of texts, or lists of tokens", value)
    if not value:
        raise wrong_field("prompt", "is an empty list; give a text or tokens")
    if isinstance(value[0], int):
        return [(_tokens(value, model), None)]
    if len(value) > MOST_TEXTS:
        raise wrong_field("prompt", f"has {len(value):,} texts, and at most {MOST_TEXTS} are taken")
    return [
        (_tokens(each, model), None) if isinstance(each, list) else _text(each, model)
        for each in value
    ]


def _text(value: Any, model: ServedModel) -> Prompt:
    text = check_text("prompt", value)
    return model.encode(text), text


def _tokens(value: list[Any], model: ServedModel) -> tuple[int, ...]:
    if not value:
        raise wrong_field("prompt", "has a list without tokens; give one at least")
    return tuple(check_integer("prompt", each, 0, model.vocab_size - 1) for each in value)
