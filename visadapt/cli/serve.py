"""``visadapt serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from visadapt.checks import check_choice
from visadapt.cli.given import refuse_unused
from visadapt.cli.options import Build, Device, Online, OtherBackbone, pairs
from visadapt.cli.output import say
from visadapt.optional import require

ENGINES = ("local", "ray")


def serve(
    places: Annotated[
        list[Path],
        typer.Argument(metavar="PLACE…", help="Folders of task files, and single task files, of one backbone."),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen at; any but this machine's own needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 for any that is free.")] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 32,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="Time that a sample waits for others, in ms.")] = 5,
    max_tasks: Annotated[int, typer.Option(min=1, help="Tasks in memory at the same time.")] = 256,
    max_queue: Annotated[int, typer.Option(min=1, help="Samples that may wait; more are refused with 503.")] = 1024,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes, or replicas of Ray Serve, each with the backbone.")
    ] = 1,
    engine: Annotated[str, typer.Option(help=f"What runs the workers: {' or '.join(ENGINES)}.")] = "local",
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that requests must carry as Authorization: Bearer.")
    ] = None,
    decider: Annotated[
        Path | None, typer.Option(help="Decider's file: it chooses the task of inputs for 'auto'.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Run every sample alone: answers never depend on what else is asked.")
    ] = False,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Write a line of JSON per request to standard output.")
    ] = False,
    device: Device = None,
    backbone: OtherBackbone = None,
    build: Build = None,
    online: Online = False,
) -> None:
    """Serve the tasks of one backbone over HTTP.

    Tasks are loaded on their first request; files that are added, replaced or removed take effect at once. The page at
    / classifies images and texts, and /docs describes the API.
    """
    check_choice(engine, ENGINES, "engine")
    if exact:
        refuse_unused("--exact runs every sample alone", "max_batch", "max_wait_ms")
    if engine == "ray":
        refuse_unused("--engine ray writes no line per request", "log_requests")
    for library in ("fastapi", "prometheus_client", "python_multipart", "uvicorn"):
        require(library, "serving", "visadapt[serve]")
    running = require("visadapt.serving.running", "serving", "visadapt[serve]")
    server: dict[str, Any] = {
        "max_batch": max_batch,
        "max_wait": max_wait_ms / 1000,
        "max_tasks": max_tasks,
        "exact": exact,
        "decider": None if decider is None else str(decider),
        "device": device,
        "backbone": backbone,
        "build": pairs(build, "--build"),
        "online": online,
    }
    options = running.Options(
        places=tuple(map(str, places)),
        server=server,
        limits={"queue": max_queue},
        host=host,
        port=port,
        workers=workers,
        token_file=None if token_file is None else str(token_file),
        log_requests=log_requests,
    )
    if engine == "ray":
        require("visadapt.serving.cluster", "--engine ray", "visadapt[ray]").run(options, say)
    else:
        running.run(options, say)
