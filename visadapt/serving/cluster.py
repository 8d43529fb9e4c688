"""Serve on a cluster: replicas of a server behind Ray Serve, each task sent to the replicas that have it in memory."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from visadapt.errors import VisadaptError
from visadapt.optional import require
from visadapt.serving.app import build_app
from visadapt.serving.limits import Limits
from visadapt.serving.metrics import Metrics, summed
from visadapt.serving.refusal import ServingError
from visadapt.serving.running import Options
from visadapt.serving.server import Answer, Server
from visadapt.serving.service import described

NAME = "visadapt"
"""Name of the application on the cluster."""


class Replica:
    """A server in one process of the cluster.

    Args:
        options: what it serves.
    """

    def __init__(self, options: Options) -> None:
        self.server: Server = options.make_server().start()

    def describe(self) -> tuple[list[dict[str, Any]], str]:
        """Describe all tasks; return them and the digest of the backbone."""
        return described(self.server), self.server.model_digest

    def entry(self, name: str) -> dict[str, Any] | ServingError:
        """Describe one task; an error is returned, see `predict`."""
        try:
            return {**self.server.pool.entry(name).json(), "loaded": name in self.server.pool.loaded()}
        except ServingError as error:
            return error

    def metrics_text(self) -> bytes:
        """Return what this replica counts."""
        return self.server.metrics.text()

    async def predict(self, names: list[str], inputs: list[Any], top: int | None) -> list[Answer] | ServingError:
        """Predict the labels of some inputs; an error is returned, so that it arrives as what it is."""
        try:
            return await self.server.predict(names, inputs, top=top)
        except ServingError as error:
            return error

    def check_health(self) -> None:
        """Tell Ray Serve whether this replica answers; it is replaced if it does not."""
        if not self.server.ready:
            raise RuntimeError("the server does not run")


class ClusterService:
    """The service of the replicas, as the HTTP application asks for it.

    Requests name their task to Ray's router, which sends it to a replica that has it in memory while that has room.

    Args:
        handle: of the replicas' deployment.
        limits: upper bounds of requests.
    """

    def __init__(self, handle: Any, limits: Limits) -> None:
        self._handle = handle
        self.limits, self.metrics = limits, Metrics()
        self.ready = True

    async def start(self) -> None:
        """Do nothing: replicas start before they are asked."""

    async def stop(self) -> None:
        """Do nothing: Ray Serve lets replicas end their requests."""
        self.ready = False

    async def metrics_text(self) -> bytes:
        """Return the sums over all replicas and this front, which counts requests.

        Raises:
            ServingError: this version of Ray cannot ask all replicas.
        """
        if not hasattr(self._handle, "broadcast"):
            raise ServingError("failed", "this version of Ray cannot ask all replicas", "install Ray 2.60 or later")
        parts: list[bytes] = await self._handle.broadcast("metrics_text").results_async()
        return summed([self.metrics.text(), *parts])

    async def model(self) -> str:
        """Return the digest of the backbone."""
        digest: str = (await self._handle.describe.remote())[1]
        return digest

    async def tasks(self) -> list[dict[str, Any]]:
        """Describe all tasks, as one of the replicas sees them."""
        tasks: list[dict[str, Any]] = (await self._handle.describe.remote())[0]
        return tasks

    async def task(self, name: str) -> dict[str, Any]:
        """Describe one task, as one of the replicas sees it."""
        found: dict[str, Any] | ServingError = await self._handle.entry.remote(name)
        if isinstance(found, ServingError):
            raise found
        return found

    async def predict(self, task: str | Sequence[str], inputs: Sequence[Any], *, top: int | None) -> list[Answer]:
        """Predict the labels of some inputs: each task's on a replica that has it."""
        if isinstance(task, str) or len(inputs) == 1 or len(task) != len(inputs):
            # one task, or what a replica refuses
            names = [task] if isinstance(task, str) else list(task)
            return await self._one(names, list(inputs), top)
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(task):
            rows.setdefault(name, []).append(row)
        if len(inputs) > self.limits.inputs:
            raise ServingError("too_large", f"a request must not have more than {self.limits.inputs} inputs, got "
                               f"{len(inputs)}", "send several requests")  # fmt: skip
        parts = await asyncio.gather(
            *(self._one([name], [inputs[row] for row in each], top) for name, each in rows.items())
        )
        answers: dict[int, Answer] = {}
        for each, part in zip(rows.values(), parts, strict=True):
            answers.update(zip(each, part, strict=True))
        return [answers[row] for row in range(len(inputs))]

    async def _one(self, names: list[str], inputs: list[Any], top: int | None) -> list[Answer]:
        key = names[0] if len(names) == 1 and isinstance(names[0], str) else ""
        handle = self._handle.options(multiplexed_model_id=key) if key else self._handle
        found: list[Answer] | ServingError = await handle.predict.remote(names, inputs, top)
        if isinstance(found, ServingError):
            raise found
        return found


def application(options: Options, **deployment: Any) -> Any:
    """Make the application that Ray Serve runs.

    Args:
        options: what to serve; ``workers`` is the number of replicas.
        **deployment: passed to ``serve.deployment`` for the replicas, such as ``autoscaling_config`` (instead of
            ``num_replicas``) or ``ray_actor_options={"num_gpus": 1}``.

    Returns:
        A bound application, for ``ray.serve.run``.

    Raises:
        VisadaptError: Ray Serve is not installed.
    """
    serve = require("ray.serve", "serving on a cluster", "visadapt[ray]")
    most = options.server.get("max_tasks", 256)

    class Sticky(Replica):
        @serve.multiplexed(max_num_models_per_replica=most)  # type: ignore[untyped-decorator]
        async def task(self, name: str) -> str:
            """Tell the router that this replica has a task; the pool loads it."""
            return name

        async def predict(self, names: list[str], inputs: list[Any], top: int | None) -> list[Answer] | ServingError:
            """Predict, and remember the task as one of this replica's."""
            key = serve.get_multiplexed_model_id()
            found = await super().predict(names, inputs, top)
            if key and not isinstance(found, ServingError):
                await self.task(key)
            return found

    class Ingress:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def __serve_build_asgi_app__(self) -> Any:
            service = ClusterService(self.handle, Limits(**options.limits))
            return build_app(service, token=options.token(), hosts=options.hosts())

    if "autoscaling_config" not in deployment:
        deployment.setdefault("num_replicas", options.workers)
    deployment.setdefault("max_ongoing_requests", options.limits.get("queue", Limits().queue))
    replicas = serve.deployment(name="replicas", **deployment)(Sticky)
    # it waits for the replicas: no processor is kept for it, which they may need
    front = serve.deployment(
        name="http",
        max_ongoing_requests=deployment["max_ongoing_requests"],
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(Ingress))
    return front.bind(replicas.bind(options))


def _connect(workers: int) -> None:
    """Connect to the cluster that Ray finds, or start one on this machine that has room for all replicas."""
    ray = require("ray", "serving on a cluster", "visadapt[ray]")
    if ray.is_initialized():
        return
    try:
        ray.init(address="auto", namespace="serve")
    except ConnectionError:
        # processes may share a processor, as those of the local engine do: Ray would wait for one for each, for ever
        ray.init(num_cpus=max(os.cpu_count() or 1, workers), namespace="serve")


def run(options: Options, say: Callable[[str], None]) -> None:
    """Serve on the cluster that Ray finds, or on one of this machine's own, until SIGTERM or SIGINT.

    Args:
        options: what to serve, and how.
        say: receives a line when the server listens.

    Raises:
        VisadaptError: Ray Serve is not installed, or what is to be served cannot be loaded.
    """
    serve = require("ray.serve", "serving on a cluster", "visadapt[ray]")
    options.token()
    if options.port == 0:
        raise VisadaptError("port must be given with --engine ray, got 0")
    _connect(options.workers)
    serve.start(http_options={"host": options.host, "port": options.port})
    serve.run(application(dataclasses.replace(options)), name=NAME, route_prefix="/")
    say(f"listening at http://{options.host}:{options.port}")
    stopped = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: stopped.set()) for number in numbers]
    try:
        stopped.wait()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        serve.shutdown()
