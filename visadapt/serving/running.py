"""Run the HTTP server: uvicorn on one machine, in one process or several."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import logging
import os
import socket
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from visadapt.checks import check_count
from visadapt.errors import VisadaptError
from visadapt.reading import SMALL, opened
from visadapt.serving.app import build_app
from visadapt.serving.connections import HEAD_BYTES, BoundedProtocol
from visadapt.serving.guard import App
from visadapt.serving.guard import log as requests
from visadapt.serving.heap import trim_heap
from visadapt.serving.limits import Limits
from visadapt.serving.processes import REPLACES, Processes, end_with_supervisor
from visadapt.serving.server import Server
from visadapt.serving.service import LocalService

_OPTIONS = "VISADAPT_SERVE"
"""Environment variable by which the processes of a server get their options."""


@dataclass(frozen=True)
class Options:
    """What a server is started with; JSON values only, so that other processes can be given them.

    Args:
        places: task files, and folders of task files.
        server: further arguments of `visadapt.serving.Server`.
        limits: arguments of `visadapt.serving.Limits`.
        host: address to listen at.
        port: 0 for any that is free.
        workers: processes, each with the backbone and a pool of its own.
        token_file: file with the token that requests must carry; required unless the host is of this machine only.
        log_requests: whether to write a line of JSON per request to standard output.
        drain: seconds that requests have to end after SIGTERM.
    """

    places: tuple[str, ...]
    server: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    limits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    token_file: str | None = None
    log_requests: bool = False
    drain: int = 30

    def __post_init__(self) -> None:
        check_count(self.workers, "workers")
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 0 <= self.port < 65536:
            raise VisadaptError(f"port must be an integer from 0 to 65535, got {self.port!r}")
        if self.token_file is None and not is_loopback(self.host):
            raise VisadaptError(
                f"host {self.host!r} can be reached from other machines: give the token that they need with "
                "--token-file, or listen at 127.0.0.1"
            )

    def token(self) -> str | None:
        """Read the token.

        Raises:
            VisadaptError: the file cannot be read, or does not hold one line of 16 characters or more.
        """
        if self.token_file is None:
            return None
        path = Path(self.token_file)
        try:
            with opened(path) as file:
                mode = os.fstat(file.fileno()).st_mode
                # no token is as long
                token = file.read(SMALL).decode("ascii").strip()
        except (OSError, ValueError) as error:  # a VisadaptError is a ValueError
            raise VisadaptError(f"cannot read the token in {path}: {error}") from error
        if len(token) < 16 or not token.isprintable() or " " in token:
            raise VisadaptError(f"{path} must hold a token of 16 or more printable characters without spaces")
        if mode & (stat.S_IRGRP | stat.S_IROTH):
            warnings.warn(f"{path} can be read by other users: chmod 600 {path}", stacklevel=2)
        return token

    def make_server(self) -> Server:
        """Load the backbone."""
        return Server(list(self.places), limits=Limits(**self.limits), **self.server)

    def hosts(self) -> list[str] | None:
        """The names that requests may use for this server; None for any."""
        if self.token_file is not None:
            return None
        return ["localhost", "127.0.0.1", "::1", self.host]


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(options: Options, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; requests that were accepted are answered first.

    Args:
        options: what to serve, and how.
        say: receives a line when the server listens.

    Raises:
        VisadaptError: what is to be served cannot be loaded, the address is in use, or the warm-up failed.
    """
    options.token()  # a wrong one is said before the backbone is loaded
    if options.workers > 1:
        _run_processes(options, say)
        return
    failures: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = _application(options, failed)
    server = uvicorn.Server(uvicorn.Config(app, **_uvicorn(options)))
    sock = _bound(options)
    say(f"listening at {_address(options.host, sock.getsockname()[1])}")
    server.run(sockets=[sock])
    if failures:
        raise VisadaptError(f"the warm-up failed: {failures[0] or type(failures[0]).__name__}") from failures[0]


def _run_processes(options: Options, say: Callable[[str], None]) -> None:
    options.make_server()  # an error is said once, not by every process
    trim_heap()
    with tempfile.TemporaryDirectory(prefix="visadapt-metrics-") as folder:
        environment = {_OPTIONS: json.dumps(dataclasses.asdict(options)), "PROMETHEUS_MULTIPROC_DIR": folder}
        kept = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            config = uvicorn.Config(
                "visadapt.serving.running:application", factory=True, workers=options.workers,
                timeout_worker_healthcheck=60, **_uvicorn(options),
            )  # fmt: skip
            sock = _bound(options)
            say(f"listening at {_address(options.host, sock.getsockname()[1])}")
            Processes(config, sock, folder, say).run()
        finally:
            for name, value in kept.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def application() -> App:
    """Make the application in one of several processes."""
    end_with_supervisor()
    options = json.loads(os.environ[_OPTIONS])
    return _application(Options(**{**options, "places": tuple(options["places"])}))


def _application(options: Options, failed: Callable[[BaseException], None] | None = None) -> App:
    if options.log_requests:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        requests.handlers, requests.propagate = [handler], False
        requests.setLevel(logging.INFO)
    service = LocalService(options.make_server(), drain=options.drain)
    service.metrics.restarts.inc(int(os.environ.get(REPLACES, "0")))
    warm_first = options.workers > 1
    return build_app(service, token=options.token(), hosts=options.hosts(), warm_first=warm_first, failed=failed)


def _uvicorn(options: Options) -> dict[str, Any]:
    return {
        "host": options.host,
        "port": options.port,
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": options.drain,
        "http": BoundedProtocol,
        "ws": "none",
        "h11_max_incomplete_event_size": HEAD_BYTES,
        "lifespan": "on",
        "interface": "asgi3",
    }


def _bound(options: Options) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        address = _address(options.host, options.port)
        raise VisadaptError(f"cannot listen at {address}: {error.strerror or error}") from error


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
