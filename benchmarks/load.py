"""Requests to a server over HTTP on loopback: as many at a time as asked, or at random times at a mean rate."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any

from torch import Tensor

from visadapt.optional import require

Ask = Callable[[str, int], Awaitable[None]]
"""Asks a task for the answer to an input, by its number."""


class Connections:
    """Connections to a server that are kept open, each with one request at a time.

    Args:
        port: of the server on loopback.
        inputs: what requests send, texts or uint8 images ``(3, H, W)``.
    """

    def __init__(self, port: int, inputs: Sequence[Any]) -> None:
        self._port = port
        self._inputs = [_encoded(given) for given in inputs]
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, task: str, number: int) -> None:
        """Send one request and read its answer.

        Raises:
            RuntimeError: the answer is not a prediction.
        """
        body = b'{"task": "%s", "inputs": [%s]}' % (task.encode(), self._inputs[number])
        head = (
            f"POST /v1/predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        reader, writer = self._free.pop() if self._free else await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in answer.split(b"\r\n")[1:] if line)
        content = await reader.readexactly(int(fields[b"content-length"]))
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(content.decode())
        self._free.append((reader, writer))

    async def close(self) -> None:
        """Close all connections."""
        for _, writer in self._free:
            writer.close()


def _encoded(given: Any) -> bytes:
    if isinstance(given, str):
        return json.dumps({"text": given}).encode()
    assert isinstance(given, Tensor)
    file = io.BytesIO()
    require("PIL.Image", "an image", "pillow").fromarray(given.permute(1, 2, 0).numpy()).save(file, "PNG")
    return json.dumps({"image": base64.b64encode(file.getvalue()).decode()}).encode()


class Load:
    """Sends requests, each for a task drawn by Zipf's law: the r-th is asked for 1/r as often as the first.

    Args:
        ask: sends one.
        tasks: number of tasks, ``t0`` and so on.
        inputs: number of inputs that are sent in turns.
    """

    def __init__(self, ask: Ask, tasks: int, inputs: int) -> None:
        self._ask, self._inputs, self._random = ask, inputs, Random(0)
        self._names = [f"t{i}" for i in range(tasks)]
        self._weights = [1 / rank for rank in range(1, tasks + 1)]

    async def one(self) -> float:
        """Send a request; return the seconds until its answer."""
        name = self._random.choices(self._names, self._weights)[0]
        start = time.perf_counter()
        await self._ask(name, self._random.randrange(self._inputs))
        return time.perf_counter() - start

    async def saturated(self, seconds: float, waiting: int) -> float:
        """Keep so many requests waiting for some seconds; return the answers per second."""
        start, answered = time.perf_counter(), 0

        async def client() -> None:
            nonlocal answered
            while time.perf_counter() < start + seconds:
                await self.one()
                answered += 1

        await asyncio.gather(*(client() for _ in range(waiting)))
        return answered / (time.perf_counter() - start)

    async def open_loop(self, seconds: float, rate: float) -> list[float]:
        """Send requests at random times at a mean rate, however long the answers take; return their seconds, sorted.

        The times are those of a Poisson process. No request is sent once the seconds are over.
        """
        start, due, sent = time.perf_counter(), 0.0, []
        while (due := due + self._random.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            sent.append(asyncio.create_task(self.one()))
        return sorted(await asyncio.gather(*sent)) or [await self.one()]


def quantile(times: Sequence[float], share: float) -> float:
    """Return a quantile of sorted values."""
    return times[min(len(times) - 1, int(share * len(times)))]


def without_overhead(forward: dict[int, float], rate: float, share: float, requests: int = 20_000) -> float:
    """Simulate a server that does nothing but forwards, first come first served, at random arrivals.

    It begins the next forward at once, on all that waits up to a limit. The limit is the best of the sizes in
    ``forward``, so that no smaller batches would be quicker.

    Args:
        forward: seconds of a forward pass by batch size.
        rate: mean arrivals per second.
        share: which quantile.
        requests: number of requests that are simulated.

    Returns:
        The quantile of the latencies in seconds.
    """
    random, arrivals = Random(0), [0.0]
    for _ in range(requests):
        arrivals.append(arrivals[-1] + random.expovariate(rate))
    return min(quantile(_latencies(forward, arrivals, most), share) for most in forward)


def _latencies(forward: dict[int, float], arrivals: Sequence[float], most: int) -> list[float]:
    """Latencies, sorted, of a server that takes at most so many requests at once."""
    latencies: list[float] = []
    first, now = 0, 0.0
    while first < len(arrivals):
        now, last = max(now, arrivals[first]), first
        while last < len(arrivals) and arrivals[last] <= now and last - first < most:
            last += 1
        now += _interpolated(forward, last - first)
        latencies += [now - arrival for arrival in arrivals[first:last]]
        first = last
    return sorted(latencies)


def _interpolated(forward: dict[int, float], size: int) -> float:
    below = max(known for known in forward if known <= size)
    above = min(known for known in forward if known >= size)
    if below == above:
        return forward[below]
    return forward[below] + (forward[above] - forward[below]) * (size - below) / (above - below)
