"""What every HTTP request passes: the right host, the right token, a bounded body; and its line in the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from visadapt.serving.refusal import ServingError

log = logging.getLogger("visadapt.requests")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/", "/docs", "/openapi.json", "/healthz", "/readyz"})
"""Paths without anything of the tasks, which need no token."""

HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


class Guard:
    """An ASGI middleware.

    Args:
        app: the application.
        token: what ``Authorization: Bearer …`` must hold; None where none is needed.
        hosts: names that the ``Host`` header may hold, so that no web page can reach a server on loopback by a name
            of its own; None for any.
        body: bytes that a body may have.
        patience: seconds that a client may take for each part of its body.
    """

    def __init__(
        self, app: App, token: str | None, hosts: Iterable[str] | None, body: int, patience: float = 30.0
    ) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._body, self._patience = body, patience

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        scope.setdefault("state", {})["log"] = noted = {}

        async def sends(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((n, v) for n, v in HEADERS.items() if n not in own)]
            await send(message)

        try:
            try:
                self._check(scope)
            except ServingError as error:
                await _answer(error, sends)
                noted["error"] = error.name
                return
            await self._app(scope, self._bounded(receive), sends)
        finally:
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
        if length.isdigit() and int(length[:20]) > self._body:
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        size = 0
        ended = False

        async def receives() -> Message:
            nonlocal size, ended
            if ended:  # waits for the client to go
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._patience)
            except asyncio.TimeoutError as error:
                raise ServingError("timeout", f"no data for {self._patience:g} seconds", "send it faster") from error
            size += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if size > self._body:
                raise self._too_large()
            return message

        return receives

    def _too_large(self) -> ServingError:
        return ServingError("too_large", f"a request must not have more than {self._body:,} bytes",
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
    if error.name in ("timeout", "too_large"):
        # what is left of the body is not read
        found["connection"] = "close"
    return found


async def _answer(error: ServingError, send: Send) -> None:
    body = json.dumps(error.json()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **headers_of(error)}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
