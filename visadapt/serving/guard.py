"""What every HTTP request passes: the right host, the right token, a bounded body; and its line in the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from visadapt.serving.limits import Limits
from visadapt.serving.refusal import ServingError

log = logging.getLogger("visadapt.requests")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/", "/docs", "/openapi.json", "/healthz", "/readyz"})
"""Paths without anything of the tasks, which need no token."""

PREDICT = "/v1/predict"
"""The path of the requests that are counted."""

HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}

SLOWEST = 10_000
"""Bytes per second that a client must send on the average, so that none holds a connection for hours."""


@dataclass
class Body:
    """What has come of the body of a request.

    Attributes:
        size: its bytes so far.
        ended: whether that is all.
        start: time of the request, by `time.monotonic`.
    """

    size: int = 0
    ended: bool = False
    start: float = field(default_factory=time.monotonic)


class Guard:
    """An ASGI middleware.

    Args:
        app: the application.
        token: what ``Authorization: Bearer …`` must hold; None where none is needed.
        hosts: names that the ``Host`` header may hold, so that no web page can reach a server on loopback by a name
            of its own; None for any.
        limits: upper bounds of bodies.
        patience: seconds that a client may take for each part of its body, and for all of it beyond what it takes at
            `SLOWEST`.
        count: called with the outcome of each request for predictions, before it is answered: ``"ok"``, or the name of
            the error.
    """

    def __init__(
        self,
        app: App,
        token: str | None,
        hosts: Iterable[str] | None,
        limits: Limits,
        patience: float = 30.0,
        count: Callable[[str], None] | None = None,
    ) -> None:
        self._app, self._count = app, count
        self._token = None if token is None else token.encode()
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._limits, self._patience = limits, patience
        self._held = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            # the server leaves out the body of the answer
            scope = {**scope, "method": "GET"}
        start, status = time.perf_counter(), 0
        noted: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = noted
        body = Body()

        async def sends(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._count is not None and scope["path"] == PREDICT:
                    self._count(noted.get("error", "ok"))
                own = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((n, v) for n, v in HEADERS.items() if n not in own)]
            await send(message)

        try:
            try:
                self._check(scope)
            except ServingError as error:
                noted["error"] = error.name
                await _answer(error, sends)
                return
            await self._app(scope, self._bounded(receive, body), sends)
        finally:
            self._held -= body.size
            if log.isEnabledFor(logging.INFO):
                line = {
                    "time": round(time.time(), 3),
                    "method": scope["method"],
                    "path": scope["path"][:200],
                    "status": status,
                    "seconds": round(time.perf_counter() - start, 6),
                    **noted,
                }
                log.info(json.dumps(line))

    def _check(self, scope: Message) -> None:
        headers = dict(scope["headers"])
        if self._hosts is not None:
            host = _host(headers.get(b"host", b"").decode("latin-1"))
            if host not in self._hosts:
                raise ServingError("wrong_host", f"this server does not answer to the name {host!r:.100}",
                                   "use the address that it was started with, or start it with a token")  # fmt: skip
        if self._token is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            scheme, _, token = given.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
                raise ServingError("unauthorized", "the token is missing or wrong",
                                   "send the header Authorization: Bearer TOKEN")  # fmt: skip
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._limits.body:
            raise self._too_large()

    def _bounded(self, receive: Receive, body: Body) -> Receive:
        async def receives() -> Message:
            if body.ended:  # waits for the client to go
                return await receive()
            left = body.start + self._patience + body.size / SLOWEST - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), min(self._patience, left))
            except asyncio.TimeoutError as error:
                said = f"{body.size:,} bytes in {time.monotonic() - body.start:.0f} seconds"
                raise ServingError("timeout", f"the body comes too slowly: {said}", "send it faster") from error
            size = len(message.get("body", b""))
            body.size += size
            body.ended = not message.get("more_body", False)
            self._held += size
            if body.size > self._limits.body:
                raise self._too_large()
            if self._held > self._limits.bodies:
                said = f"requests of more than {self._limits.bodies:,} bytes are being answered"
                raise ServingError("overloaded", said, "send the request again later", retry_after=1)
            return message

        return receives

    def _too_large(self) -> ServingError:
        return ServingError("too_large", f"a request must not have more than {self._limits.body:,} bytes",
                            "send smaller images, or several requests")  # fmt: skip


def _host(header: str) -> str:
    """The host of a ``Host`` header, without the port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def headers_of(error: ServingError) -> dict[str, str]:
    """The HTTP headers that an error brings."""
    found = {}
    if error.retry_after is not None:
        found["retry-after"] = str(max(1, round(error.retry_after)))
    if error.status == 401:
        found["www-authenticate"] = "Bearer"
    if error.name in ("timeout", "too_large", "overloaded"):
        # what is left of the body is not read
        found["connection"] = "close"
    return found


async def _answer(error: ServingError, send: Send) -> None:
    body = json.dumps(error.json()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **headers_of(error)}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
