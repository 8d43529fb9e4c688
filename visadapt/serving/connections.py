"""Connections of uvicorn whose clients must send the head of a request within a time and a size.

Uvicorn bounds neither with every parser; bodies are bounded by `visadapt.serving.guard`.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from visadapt.serving.refusal import ServingError

HEAD_SECONDS = 20.0
"""Time from the first byte of a head, or from the connection, to the end of the head."""

HEAD_BYTES = 64 << 10

UNREAD_BYTES = 64 << 20
"""Bytes that may still come of a body that was not read, as its request was answered with an error."""


def bounded(base: Any) -> Any:
    """Bound the heads of a protocol of uvicorn.

    Args:
        base: the class of the protocol, for either of its parsers.

    Returns:
        A subclass.
    """

    class BoundedProtocol(base):  # type: ignore[misc]
        """One connection."""

        waited = 0
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            """Begin to wait for the first head."""
            super().connection_made(transport)
            self.begin()

        def connection_lost(self, exc: Exception | None) -> None:
            """Wait for nothing more."""
            self.end()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """Pass data on to the parser, and close the connection if they make no head that is small enough."""
            cycle = self.cycle
            waits = cycle is None or cycle.response_complete
            super().data_received(data)
            if self.cycle is not cycle or not waits:  # a head is complete
                self.end()
                return
            self.waited += len(data)
            if self.waited > (HEAD_BYTES if cycle is None or not cycle.more_body else UNREAD_BYTES):
                self.send_400_response(f"The head of a request must not have more than {HEAD_BYTES:,} bytes.")
            elif self.timer is None:
                self.begin()

        def send_400_response(self, msg: str) -> None:
            """Answer what is not a request, and close the connection."""
            self.end()
            if self.transport.is_closing():
                return
            error = ServingError("malformed", f"{msg[:1].lower()}{msg[1:].rstrip('.')}", "send a request of HTTP/1.1")
            body = json.dumps(error.json()).encode()
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
            self.transport.close()

        def begin(self) -> None:
            """Begin to wait for a head."""
            self.timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

        def end(self) -> None:
            """End to wait for a head."""
            self.waited = 0
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    return BoundedProtocol


BoundedProtocol: Any = bounded(AutoHTTPProtocol)
# so that it can be pickled for other processes
BoundedProtocol.__qualname__ = "BoundedProtocol"
