"""The HTTP application."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from visadapt.serving.guard import PREDICT, App, Guard, headers_of
from visadapt.serving.parsing import ErrorResponse, PredictRequest, PredictResponse, parse
from visadapt.serving.refusal import ServingError
from visadapt.serving.server import Answer
from visadapt.serving.service import Service

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": PredictRequest.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["task"],
                    "properties": {
                        "task": {"type": "array", "items": {"type": "string"}},
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        "text": {"type": "array", "items": {"type": "string"}},
                        "top": {"type": "integer"},
                    },
                }
            },
        },
    }
}

_REASONS = {
    401: "The token is missing or wrong.",
    404: "There is no such task; the nearest is named.",
    413: "The request, an image or a text is too large.",
    422: "The request is malformed, an input cannot be decoded or is of the wrong kind.",
    500: "The file of the task is broken, or the model failed.",
    503: "The server is overloaded, not ready or stopping; Retry-After says when to come back.",
}

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": reason} for status, reason in _REASONS.items()
}


def build_app(
    service: Service,
    *,
    token: str | None = None,
    hosts: Iterable[str] | None = None,
    warm_first: bool = False,
    failed: Callable[[BaseException], None] | None = None,
) -> App:
    """Make the ASGI application of a service.

    Args:
        service: what answers.
        token: what requests must carry as ``Authorization: Bearer …``; None where none is needed.
        hosts: names that the ``Host`` header may hold; None for any.
        warm_first: whether to accept requests only after the warm-up: one of several processes that share a port must
            not answer that it is not ready while others are.
        failed: called if the warm-up, beside the requests, raises: the server will never be ready.

    Returns:
        An ASGI application, which starts and stops the service with its lifespan.
    """
    app = FastAPI(
        title="visadapt",
        description="One frozen network answers for many tasks.",
        docs_url=None,  # FastAPI's page loads its scripts from a network
        redoc_url=None,
        lifespan=lambda _: _lifespan(service, warm_first, failed),
    )
    _add_errors(app)
    _add_api(app, service)
    _add_state(app, service)
    for path, name in (("/", "page.html"), ("/docs", "docs.html")):
        _add_page(app, path, name)
    requests = service.metrics.requests
    return Guard(app, token, hosts, service.limits, count=lambda outcome: requests.labels(outcome).inc())


@asynccontextmanager
async def _lifespan(
    service: Service, warm_first: bool, failed: Callable[[BaseException], None] | None
) -> AsyncIterator[None]:
    def ended(starting: asyncio.Task[None]) -> None:
        if not starting.cancelled() and (error := starting.exception()) and failed:
            failed(error)

    starting = asyncio.create_task(service.start())
    if warm_first:
        await starting
    else:  # beside the requests: /healthz answers meanwhile
        starting.add_done_callback(ended)
    try:
        yield
    finally:
        await asyncio.wait([starting])
        await service.stop()


def _add_api(app: FastAPI, service: Service) -> None:
    @app.post(PREDICT, response_model=PredictResponse, responses=_ERRORS, openapi_extra=_BODY)
    async def predict(request: Request) -> JSONResponse:
        """Predict the labels of images or texts."""
        parsed = await parse(request, service.limits)
        request.state.log.update(task=_short(parsed.task), inputs=len(parsed.inputs))
        answers = await service.predict(parsed.task, parsed.inputs, top=parsed.top)
        return JSONResponse(
            {
                "predictions": [_predicted(answer) for answer in answers],
                "task": [answer.task for answer in answers],
                "digest": [answer.digest for answer in answers],
                "model": await service.model(),
            }
        )

    @app.get("/v1/tasks", responses={401: _ERRORS[401]})
    async def tasks() -> JSONResponse:
        """List the tasks, those whose file is broken with the error."""
        return JSONResponse({"tasks": await service.tasks(), "model": await service.model()})

    @app.get("/v1/tasks/{name}", responses={status: _ERRORS[status] for status in (401, 404, 500)})
    async def task(name: str) -> JSONResponse:
        """Describe a task."""
        return JSONResponse(await service.task(name))


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """Tell that the process runs."""
        return JSONResponse({"status": "ok"})

    @app.get("/readyz", responses={503: _ERRORS[503]})
    async def readyz() -> JSONResponse:
        """Tell whether requests are answered."""
        if not service.ready:
            raise ServingError("not_ready", "the server warms up or stops", "ask again", retry_after=1)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", responses={401: _ERRORS[401]})
    async def metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(await service.metrics_text(), media_type=service.metrics.content_type)


def _add_errors(app: FastAPI) -> None:
    def answered(request: Request, error: ServingError, **headers: str) -> JSONResponse:
        request.state.log["error"] = error.name
        return JSONResponse(error.json(), error.status, headers={**headers_of(error), **headers})

    @app.exception_handler(ServingError)
    async def refused(request: Request, error: ServingError) -> JSONResponse:
        return answered(request, error)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> JSONResponse:
        name = "method_not_allowed" if error.status_code == 405 else "not_found"
        message = f"{request.method} {request.url.path[:100]} is not part of this API"
        # which methods there are
        return answered(request, ServingError(name, message, "see /docs"), **(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        # for the log: the client is gone
        return answered(request, ServingError("timeout", "the client left before its request was complete", "stay"))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        # the details are in the server's log, not in the response
        return answered(request, ServingError("failed", "the server failed on this request", "see the server's log"))


def _add_page(app: FastAPI, path: str, name: str) -> None:
    html = files("visadapt.serving").joinpath("web").joinpath(name).read_text(encoding="utf-8")
    headers = {"content-security-policy": content_policy(html)}

    @app.get(path, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)


def content_policy(html: str) -> str:
    """Allow a page nothing but its own script and style, and requests to its own server."""

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts
        )

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _predicted(answer: Answer) -> list[dict[str, Any]]:
    """Labels with their scores or, of a regression, names of outputs with their values."""
    name, numbers = ("value", answer.values) if answer.values else ("score", answer.scores)
    return [{"label": label, name: number} for label, number in zip(answer.labels, numbers, strict=True)]


def _short(task: str | list[str]) -> str | list[str]:
    return task[:100] if isinstance(task, str) else [name[:100] for name in task[:8]]
