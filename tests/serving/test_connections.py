"""Clients that send nothing, too much, or too slowly: they are answered or left, and the others are served."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.h11_impl import H11Protocol

from visadapt.serving import Limits, ServingError, connections, guard
from visadapt.serving.connections import bounded
from visadapt.serving.guard import Guard

PROTOCOLS = list(dict.fromkeys([AutoHTTPProtocol, H11Protocol]))

GET = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Read the body unless the path says otherwise, and answer with its size."""
    size, status, more = 0, 200, scope["path"] != "/unread"
    try:
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
    except ServingError as error:
        status = error.status
    body = f"{scope['method']} {size}".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(protocol: Any, **limits: int) -> Iterator[int]:
    """Serve on loopback; give the port."""
    guarded = Guard(app, None, ["127.0.0.1"], Limits(**limits), patience=0.3)
    config = uvicorn.Config(guarded, port=0, http=bounded(protocol), ws="none", lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)


def answer(connection: socket.socket) -> bytes:
    """Read one answer; empty if the connection is closed instead."""
    received = b""
    try:
        while more := connection.recv(65536):
            received += more
            head, _, body = received.partition(b"\r\n\r\n")
            length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
            if length and len(body) >= int(length[0].partition(b":")[2]):
                break
    except ConnectionError:
        pass
    return received


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def talk(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send some bytes by a new connection, and read the answer."""
    with connect(port) as connection:
        for part in parts:
            with suppress(ConnectionError):
                connection.sendall(part)
                time.sleep(pause)
        return answer(connection)


def post(path: bytes, size: int, *fields: bytes) -> bytes:
    head = (b"POST %s HTTP/1.1" % path, b"Host: 127.0.0.1", b"Content-Length: %d" % size, *fields)
    return b"\r\n".join(head) + b"\r\n\r\n"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_heads_are_bounded(protocol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    with serving(protocol) as port:
        assert talk(port, GET).startswith(b"HTTP/1.1 200")
        for begun in (GET[:-2] + b"X: ", b"GET /", b"GET /healthz HTTP/1.1\r\n"):
            said = talk(port, begun + b"a" * connections.HEAD_BYTES).partition(b"\r\n\r\n")[2]
            assert json.loads(said)["error"]["name"] == "malformed"
        # nothing; part of a head; a head whose end never comes
        assert talk(port) == talk(port, GET[:9]) == b""
        start = time.monotonic()
        assert talk(port, GET[:-2] + b"X: ", *[b"a"] * 10, pause=0.05) == b""
        assert time.monotonic() - start < 3
        with connect(port) as connection:
            connection.sendall(GET)
            assert answer(connection).startswith(b"HTTP/1.1 200")
            connection.sendall(GET[:20])
            assert answer(connection) == b""
        # a head in pieces, and requests after each other
        assert talk(port, GET[:9], GET[9:], pause=0.1).startswith(b"HTTP/1.1 200")
        with connect(port) as connection:
            for _ in range(3):
                connection.sendall(GET)
                assert answer(connection).startswith(b"HTTP/1.1 200")
                time.sleep(0.15)  # together longer than a head may take


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_not_http_is_answered_as_json(protocol: Any) -> None:
    with serving(protocol) as port:
        for data in (b"\x16\x03\x01\x02" * 20, b"GET\r\n\r\n", post(b"/", -1)):
            head, _, body = talk(port, data).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400"), (data, head)
            assert set(json.loads(body)["error"]) == {"name", "message", "remedy"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_body_that_is_not_read_does_not_hide_the_answer(protocol: Any) -> None:
    with serving(protocol, body=1 << 20) as port:
        parts = [post(b"/unread", 600_000), *[b"a" * 50_000] * 12]
        assert talk(port, *parts, pause=0.01).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bodies_that_come_too_slowly(protocol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(protocol) as port:
        # byte by byte, and each of them in time
        start = time.monotonic()
        answer = talk(port, post(b"/", 1000), *([b"a"] * 12), pause=0.05)
        assert answer.startswith(b"HTTP/1.1 408"), answer
        assert time.monotonic() - start < 2
        # as slow, but as fast as is asked for
        monkeypatch.setattr(guard, "SLOWEST", 10)
        assert talk(port, post(b"/", 12), *([b"a"] * 12), pause=0.05).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_all_bodies_together_are_bounded(protocol: Any) -> None:
    with serving(protocol, body=1000, bodies=1500) as port:
        with connect(port) as other:
            other.sendall(post(b"/", 1000) + b"a" * 900)
            time.sleep(0.1)
            assert talk(port, post(b"/", 800) + b"a" * 800).startswith(b"HTTP/1.1 503")
            assert talk(port, post(b"/", 500) + b"a" * 500).startswith(b"HTTP/1.1 200")
            other.sendall(b"a" * 100)
            assert answer(other).startswith(b"HTTP/1.1 200")
        # what was held is free again
        for _ in range(3):
            assert talk(port, post(b"/", 1000) + b"a" * 1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_head_is_get_without_a_body(protocol: Any) -> None:
    with serving(protocol) as port, connect(port) as connection:
        connection.sendall(GET.replace(b"GET", b"HEAD") + GET)
        received = b""
        while received.count(b"HTTP/1.1 200") < 2 or not received.endswith(b"GET 0"):
            received += connection.recv(999)
        assert received.count(b"GET 0") == 1
        assert received.count(b"content-length: 5") == 2
