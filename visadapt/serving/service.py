"""What the HTTP application asks for: predictions, tasks and metrics, of this process or of a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from visadapt.serving.catalogue import Entry
from visadapt.serving.limits import Limits
from visadapt.serving.metrics import Metrics
from visadapt.serving.refusal import ServingError
from visadapt.serving.server import Answer, Server

T = TypeVar("T")


class Service(Protocol):
    """The part of a server that the HTTP application uses."""

    limits: Limits
    metrics: Metrics

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""

    async def model(self) -> str:
        """Return the digest of the backbone."""

    async def predict(self, task: str | Sequence[str], inputs: Sequence[Any], *, top: int | None) -> list[Answer]:
        """Predict the labels of some inputs."""

    async def tasks(self) -> list[dict[str, Any]]:
        """Describe all tasks as JSON values, those that cannot be used with their error."""

    async def task(self, name: str) -> dict[str, Any]:
        """Describe one task, or raise a ServingError."""

    async def metrics_text(self) -> bytes:
        """Return the metrics of all that answers, in Prometheus' text format."""

    async def start(self) -> None:
        """Warm up."""

    async def stop(self) -> None:
        """Answer what waits, and stop."""


class LocalService:
    """The service of a server in this process.

    Args:
        server: the server; started and stopped with the application.
        drain: seconds to wait, when it stops, for the requests that are being answered.
    """

    def __init__(self, server: Server, drain: float | None = None) -> None:
        self.server, self._drain = server, drain
        self.limits, self.metrics = server.limits, server.metrics
        self.predict = server.predict

    @property
    def ready(self) -> bool:
        """Whether the server has warmed up and is not stopping."""
        return self.server.ready

    async def model(self) -> str:
        """Return the digest of the backbone."""
        return self.server.model_digest

    async def tasks(self) -> list[dict[str, Any]]:
        """Describe all tasks; files are read in a thread."""
        return await _in_thread(lambda: described(self.server))

    async def task(self, name: str) -> dict[str, Any]:
        """Describe one task."""
        return await _in_thread(lambda: {**self.server.pool.entry(name).json(), "loaded": name in _loaded(self.server)})

    async def metrics_text(self) -> bytes:
        """Return the metrics of this process or, of one of several, of all of them."""
        return self.metrics.text()

    async def start(self) -> None:
        """Warm up."""
        await _in_thread(self.server.start)

    async def stop(self) -> None:
        """Answer what waits, and stop."""
        await _in_thread(lambda: self.server.stop(self._drain))


def described(server: Server) -> list[dict[str, Any]]:
    """Describe all tasks of a server as JSON values."""
    loaded = _loaded(server)
    return [
        {**state.json(), "loaded": name in loaded} if isinstance(state, Entry) else {"name": name, **_error(state)}
        for name, state in server.entries()
    ]


def _error(error: ServingError) -> dict[str, Any]:
    return {"loaded": False, **error.json()}


def _loaded(server: Server) -> frozenset[str]:
    return server.pool.loaded()


async def _in_thread(function: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(None, function)
