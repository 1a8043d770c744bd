"""The body of POST /v1/chat/completions: messages, and the form of the answer."""

from dataclasses import dataclass, replace
from typing import Any

from mpillm.infer.serve.http.forms.answer_settings import (
    IGNORED,
    AnswerSettings,
    read_answer_settings,
    room_for,
)
from mpillm.infer.serve.http.forms.api_error import wrong_field
from mpillm.infer.serve.http.forms.body_fields import BodyFields, check_text, shown, wrong_type
from mpillm.infer.serve.http.forms.json_constraint import JsonConstraint
from mpillm.infer.serve.http.served_model import ServedModel
from mpillm.infer.serve.requests import TextRequest
from mpillm.tokens.chat.chat_formats import OTHER_ROLES, ROLES

MOST_LOGPROBS = 20
FORMATS = ("text", "json_object", "json_schema")
# What a model of texts has no use for, each with the value that asks for nothing.
REFUSED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("tools", ([],)),
    ("tool_choice", ("none", "auto")),
    ("functions", ([],)),
    ("function_call", ("none", "auto")),
    ("parallel_tool_calls", (True, False)),
    ("audio", ()),
    ("modalities", (["text"],)),
    ("prediction", ()),
    ("web_search_options", ()),
    ("reasoning_effort", ("none",)),
)


@dataclass(frozen=True)
class ChatForm:
    """What a client asks for: a request an answer."""

    settings: AnswerSettings
    requests: tuple[TextRequest, ...]
    logprobs: bool


def read_chat(body: BodyFields, model: ServedModel) -> ChatForm:
    """Read and check a body. Raises ApiError, which names the field at fault."""
    model.check_name(body.value("model"))
    for name, harmless in REFUSED:
        value = body.value(name)
        if value is not None and value not in harmless:
            raise wrong_field(name, "is not supported by this server; leave it out", "unsupported")
    messages = read_messages(body)
    names = ("max_completion_tokens", "max_tokens")
    settings = read_answer_settings(body, model.vocab_size, names)
    if settings.max_tokens == 0:
        raise wrong_field("max_tokens", "is 0: no token is asked for; give 1 at least")
    logprobs, top = body.flag("logprobs"), body.integer("top_logprobs", 0, MOST_LOGPROBS)
    if top is not None and not logprobs:
        raise wrong_field("top_logprobs", "belongs to logprobs: true; give both")
    constraint = _constraint(body.table("response_format"), model)
    body.refuse_others(IGNORED)
    ids = model.chat_prompt(messages)
    most = room_for(len(ids), settings.max_tokens, None, model.context, "max_tokens")
    plain = TextRequest(
        prompt=tuple(ids),
        sampling=settings.sampling(most, 0),
        end_ids=model.end_ids,
        bias=settings.bias,
        top_logprobs=(top or 0) if logprobs else None,
    )
    requests = tuple(
        replace(
            plain,
            sampling=settings.sampling(most, choice),
            constraint=constraint and model.schemas.again(constraint),
        )
        for choice in range(settings.n)
    )
    return ChatForm(settings, requests, logprobs)


def read_messages(body: BodyFields) -> list[dict[str, Any]]:
    """Read the field `messages`: a role and a text each. Raises ApiError."""
    listed = body.list("messages")
    if not listed:
        raise wrong_field("messages", "is a list of one message at least")
    return [_message(each, f"messages[{number}]") for number, each in enumerate(listed)]


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_type(place, "an object", value)
    fields = BodyFields(value, f"{place}.")
    role = fields.text("role")
    role = role if role in ROLES else OTHER_ROLES.get(role, "") if role == "developer" else ""
    if not role:
        known = ", ".join((*ROLES, "developer"))
        raise wrong_field(f"{place}.role", f"is one of {known}, and not {shown(value.get('role'))}")
    for name in ("tool_calls", "function_call", "audio"):
        if fields.value(name):
            raise wrong_field(f"{place}.{name}", "is not supported by this server")
    content = _content(value.get("content"), f"{place}.content")
    named = fields.text("name")
    # `refusal` and others of an earlier answer say nothing that a template reads.
    return {"role": role, "content": content, **({"name": named} if named else {})}


def _content(value: Any, place: str) -> str:
    if isinstance(value, str):
        return check_text(place, value)
    if not isinstance(value, list) or not value:
        raise wrong_type(place, "a text or a list of parts", value)
    texts = []
    for number, part in enumerate(value):
        where = f"{place}[{number}]"
        if not isinstance(part, dict):
            raise wrong_type(where, "an object", part)
        if part.get("type") != "text":
            rule = f"is a part of the type text, and not {shown(part.get('type'))}"
            raise wrong_field(where, f"{rule}: the model reads texts alone")
        texts.append(check_text(f"{where}.text", part.get("text")))
    return "".join(texts)


def _constraint(form: BodyFields | None, model: ServedModel) -> JsonConstraint | None:
    """Compile what `response_format` asks for; None for plain text."""
    if form is None:
        return None
    kind = form.choice("type", FORMATS, "")
    schema: dict[str, Any] = {"type": "object"}
    if kind == "json_schema":
        named = form.table("json_schema")
        given = None if named is None else named.value("schema")
        if not isinstance(given, dict):
            raise wrong_type("response_format.json_schema.schema", "an object", given)
        schema = given
    return None if kind == "text" else model.schemas.compile(schema)
