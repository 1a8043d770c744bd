"""The routes of the tokenizer, with the forms of vLLM's server: lm-eval's client asks them."""

from starlette.requests import Request
from starlette.responses import Response

from mpillm.infer.serve.http.event_stream import json_answer
from mpillm.infer.serve.http.forms.api_error import wrong_field
from mpillm.infer.serve.http.forms.body_fields import check_integer
from mpillm.infer.serve.http.forms.chat_form import read_messages
from mpillm.infer.serve.http.forms.logprob_forms import token_text
from mpillm.infer.serve.http.text_routes import read_body, served_model


async def tokenize(request: Request) -> Response:
    """Answer POST /tokenize: the ids of a `prompt`, or of `messages` by the chat template."""
    body, model = await read_body(request), served_model(request)
    model.check_name(body.value("model"))
    named = body.flag("return_token_strs")
    if "messages" in body:
        ids = model.chat_prompt(read_messages(body), body.flag("add_generation_prompt", True))
    elif "prompt" in body:
        ids = model.tokens_of(body.text("prompt"), rows=body.flag("add_special_tokens"))
    else:
        raise wrong_field("prompt", "is missing; give a text, or messages")
    body.refuse_others(("add_special_tokens",))
    texts = [token_text(model.tokenizer, each) for each in ids] if named else None
    found = {"count": len(ids), "max_model_len": model.context, "tokens": ids}
    return json_answer({**found, "token_strs": texts})


async def detokenize(request: Request) -> Response:
    """Answer POST /detokenize: the text of `tokens`."""
    body, model = await read_body(request), served_model(request)
    model.check_name(body.value("model"))
    given = body.list("tokens")
    if given is None:
        raise wrong_field("tokens", "is missing; give a list of ids")
    body.refuse_others()
    ids = [check_integer("tokens", each, 0, model.vocab_size - 1) for each in given]
    return json_answer({"prompt": model.text_of(ids)})


async def tokenizer_info(request: Request) -> Response:
    """Answer GET /tokenizer_info: the special tokens and the chat template."""
    model = served_model(request)
    named = {} if model.template is None else model.template.tokens
    return json_answer(
        {
            "tokenizer_class": model.tokenizer.name,
            "eos_token": model.tokenizer.end_of_text,
            "bos_token": named.get("bos_token"),
            "pad_token": named.get("pad_token"),
            "unk_token": named.get("unk_token"),
            "vocab_size": model.vocab_size,
            "model_max_length": model.context,
            "chat_template": None if model.template is None else model.template.text,
        }
    )
