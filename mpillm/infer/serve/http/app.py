"""The application: routes, errors in OpenAI's form, and the gate around them."""

from dataclasses import replace

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mpillm.infer.serve.http.chat_page import ChatPage
from mpillm.infer.serve.http.event_stream import error_answer, json_answer
from mpillm.infer.serve.http.forms.api_error import ApiError
from mpillm.infer.serve.http.gate import Gate, GateSettings
from mpillm.infer.serve.http.served_model import ServedModel
from mpillm.infer.serve.http.text_routes import chat, complete, embed, served_model
from mpillm.infer.serve.http.tokenizer_routes import detokenize, tokenize, tokenizer_info


def make_app(model: ServedModel, settings: GateSettings) -> Starlette:
    """Make the application that serves `model`. The routes of `settings` are set here."""
    page = ChatPage(model.name, model.template is not None, settings.tokens is not None)

    async def show_page(request: Request) -> Response:
        return Response(page.text, headers=page.headers, media_type="text/html")

    async def show_metrics(request: Request) -> Response:
        text = settings.metrics.text()
        return Response(text, headers={"Content-Type": settings.metrics.content_type})

    async def ready(request: Request) -> Response:
        failure = model.engine.counts().failure
        if failure or settings.lifetime.draining:
            raise ApiError(503, failure or "the server ends", code="not_ready")
        return json_answer({"status": "ready"})

    routes = [
        Route("/", show_page, methods=["GET"]),
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", show_model, methods=["GET"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/embeddings", embed, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", show_metrics, methods=["GET"]),
    ]
    known = frozenset(route.path for route in routes if "{" not in route.path)
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Gate, settings=replace(settings, routes=known))],
        exception_handlers={
            ApiError: _answer_error,
            HTTPException: _answer_http_error,
            Exception: _answer_fault,
        },
    )
    app.state.model, app.state.limits = model, settings.limits
    return app


async def list_models(request: Request) -> Response:
    """Answer GET /v1/models: each name of the model."""
    model = served_model(request)
    return json_answer({"object": "list", "data": [_model(model, name) for name in model.names]})


async def show_model(request: Request) -> Response:
    """Answer GET /v1/models/NAME."""
    model, name = served_model(request), request.path_params["name"]
    model.check_name(name)
    return json_answer(_model(model, name))


def _model(model: ServedModel, name: str) -> dict[str, object]:
    about = {"id": name, "object": "model", "created": model.created, "owned_by": "mpillm"}
    return {**about, "root": model.name, "max_model_len": model.context}


async def health(request: Request) -> Response:
    """Answer GET /health: whether the engine lives; it may be draining."""
    if failure := served_model(request).engine.counts().failure:
        raise ApiError(503, failure, code="engine_failed")
    return json_answer({"status": "alive"})


async def _answer_error(request: Request, failure: Exception) -> Response:
    assert isinstance(failure, ApiError)
    return error_answer(failure)


async def _answer_http_error(request: Request, failure: Exception) -> Response:
    """Answer what no route takes: an unknown path, another method."""
    assert isinstance(failure, HTTPException)
    place = f"{request.method} {request.url.path[:200]}"
    words = {404: f"there is no {place} here", 405: f"{place} is not possible; take another method"}
    text = words.get(failure.status_code, failure.detail)
    headers = failure.headers or {}
    return error_answer(ApiError(failure.status_code, text, headers=headers))


async def _answer_fault(request: Request, failure: Exception) -> Response:
    """Answer a fault of ours. Starlette raises it again, and the server prints where it was."""
    reason = f"a fault of the server: {type(failure).__name__}"
    return error_answer(ApiError(500, reason))
