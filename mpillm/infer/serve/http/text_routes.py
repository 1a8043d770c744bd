"""The routes that compute: completions, chats, embeddings."""

import asyncio
import base64
import struct
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mpillm.errors import UsageError
from mpillm.infer.serve.http.chat_answers import ChatAnswers
from mpillm.infer.serve.http.completion_answers import CompletionAnswers
from mpillm.infer.serve.http.event_stream import EventStream, json_answer, until_gone
from mpillm.infer.serve.http.forms.api_error import ApiError, wrong_field
from mpillm.infer.serve.http.forms.body_fields import (
    BodyFields,
    check_integer,
    check_text,
    parse_body,
    wrong_type,
)
from mpillm.infer.serve.http.forms.chat_form import read_chat
from mpillm.infer.serve.http.forms.completion_form import read_completion
from mpillm.infer.serve.http.lifetime import HttpLimits
from mpillm.infer.serve.http.request_record import RequestRecord
from mpillm.infer.serve.http.served_model import ServedModel

# Below this, encoding takes less than a millisecond; above, a thread does it.
QUICK_BYTES = 1 << 14
MOST_INPUTS = 2048
"""OpenAI's bound of texts of one request for embeddings."""


async def read_body(request: Request) -> BodyFields:
    """Read the body of a POST as JSON. Raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A page of another origin may send other types without being asked for its permission.
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise ApiError(415, "the body is JSON: send the header Content-Type: application/json")
    limits: HttpLimits = request.app.state.limits
    try:
        async with asyncio.timeout(limits.body_seconds):
            content = await request.body()
    except TimeoutError:
        reason = f"the body did not arrive within {limits.body_seconds:g} seconds"
        raise ApiError(408, reason) from None
    request.state.body_bytes = len(content)
    return parse_body(content)


async def complete(request: Request) -> Response:
    """Answer POST /v1/completions."""
    body, model = await read_body(request), served_model(request)
    form = await _off_loop(request, read_completion, body, model)
    return await _answer(request, CompletionAnswers(model, form, record_of(request)), form.settings)


async def chat(request: Request) -> Response:
    """Answer POST /v1/chat/completions."""
    body, model = await read_body(request), served_model(request)
    # A schema takes a second to compile at most.
    slow = "response_format" in body
    form = await _off_loop(request, read_chat, body, model, slow=slow)
    return await _answer(request, ChatAnswers(model, form, record_of(request)), form.settings)


async def _answer(
    request: Request, answers: CompletionAnswers | ChatAnswers, settings: Any
) -> Response:
    seconds = request.app.state.limits.answer_seconds
    record = record_of(request)
    record.model, record.stream = served_model(request).name, settings.stream
    if settings.stream:
        return EventStream(answers.events(), answers.close, seconds)
    try:
        return json_answer(await until_gone(request, answers.whole(), seconds))
    finally:
        answers.close()


async def embed(request: Request) -> Response:
    """Answer POST /v1/embeddings."""
    body, model = await read_body(request), served_model(request)
    prompts, form = await _off_loop(request, _read_embedding, body, model)
    try:
        vectors = await asyncio.to_thread(model.engine.embed, prompts)
    except UsageError as failure:
        raise ApiError(400, str(failure), "input") from failure
    asked = body.value("dimensions")
    if asked is not None and vectors and asked != len(vectors[0]):
        rule = f"are those of the model, {len(vectors[0])}; leave it out"
        raise wrong_field("dimensions", rule)
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(values, form)}
        for index, values in enumerate(vectors)
    ]
    count = sum(map(len, prompts))
    usage = {"prompt_tokens": count, "total_tokens": count}
    record = record_of(request)
    record.model, record.usage = model.name, usage
    return json_answer({"object": "list", "data": data, "model": model.name, "usage": usage})


def _read_embedding(body: BodyFields, model: ServedModel) -> tuple[list[tuple[int, ...]], str]:
    model.check_name(body.value("model"))
    form = body.choice("encoding_format", ("float", "base64"), "float")
    body.integer("dimensions", 1, 1 << 20)
    given = body.value("input")
    if isinstance(given, str):
        prompts = [_input_tokens(given, model)]
    elif not isinstance(given, list) or not given:
        raise wrong_type("input", "a text, a list of texts, or lists of tokens", given)
    elif isinstance(given[0], int):
        prompts = [_input_tokens(given, model)]
    else:
        if len(given) > MOST_INPUTS:
            rule = f"has {len(given):,} texts, and at most {MOST_INPUTS:,} are taken"
            raise wrong_field("input", rule)
        prompts = [_input_tokens(each, model) for each in given]
    body.refuse_others(("user",))
    for ids in prompts:
        if len(ids) > model.context:
            raise wrong_field(
                "input",
                f"has a text of {len(ids):,} tokens, and the model reads {model.context:,}; "
                "shorten it",
                "context_length_exceeded",
            )
    return prompts, form


def _input_tokens(value: Any, model: ServedModel) -> tuple[int, ...]:
    if isinstance(value, list):
        if not value:
            raise wrong_field("input", "has a list without tokens; give one at least")
        return tuple(check_integer("input", each, 0, model.vocab_size - 1) for each in value)
    text = check_text("input", value)
    return tuple(model.tokens_of(text, rows=True)) or (model.tokenizer.eot_id,)


def _vector(values: list[float], form: str) -> Any:
    if form == "float":
        return values
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


async def _off_loop(
    request: Request, read: Any, body: BodyFields, model: ServedModel, slow: bool = False
) -> Any:
    """Read a form, on a thread where it takes long: other requests' streams continue."""
    if slow or request.state.body_bytes > QUICK_BYTES:
        return await asyncio.to_thread(read, body, model)
    return read(body, model)


def served_model(request: Request) -> ServedModel:
    """Return the model of the application."""
    model: ServedModel = request.app.state.model
    return model


def record_of(request: Request) -> RequestRecord:
    """Return the record that the gate keeps of this request."""
    record: RequestRecord = request.state.record
    return record
