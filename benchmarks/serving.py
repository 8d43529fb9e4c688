"""Serve 64 tasks from one backbone: throughput, latency and memory / the bare backbone and the alternatives.

python -m benchmarks.serving --budget 240                       # writes benchmarks/results/serving-….csv and .md
python -m benchmarks.serving --budget 40 --tasks 4 --size 32 --out out.csv

Each contender runs in a process of its own, so that its memory is its own. Requests name tasks by Zipf's law (the r-th
task is asked for 1/r as often as the first) and come from the same process through `Server.predict`, one sample each.
Throughput is measured with more requests waiting than a batch holds; latency with Poisson arrivals at half of that
rate, whether or not earlier requests have been answered. The budget of seconds bounds everything.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import visadapt
from visadapt.data.hub import resolve
from visadapt.files import replacing
from visadapt.optional import available
from visadapt.serving import Limits, Server
from visadapt.table import Table

CLASSES = 10
COPIES = 8
"""Plain networks in memory at the same time; further tasks share them."""

CONTENDERS = {
    "bare backbone": "the backbone with a head, in the same server",
    "one task": "one task of Bottleneck(m=8)",
    "tasks": "tasks of Bottleneck(m=8), mixed in each batch",
    "copies": f"one plain network per task, {COPIES} in memory",
    "peft": "peft LoRA r=8, mixed in each batch by adapter_names",
}

COLUMNS = ("backbone", "contender", "figure", "value", "unit", "tasks", "setting", "threads", "torch")


def build(backbone: str, contender: str, tasks: int, size: int) -> nn.Module:
    """Build the backbone with the tasks of a contender, moved away from the identity."""
    options = {} if backbone == "resnet50" else {"num_labels": CLASSES}
    model = resolve(f"bundled/{backbone}", **options).eval()
    inputs = (
        {"kind": "images", "size": size}
        if backbone == "resnet50"
        else {"kind": "texts", "tokenizer": "bundled/minilm", "length": 64}
    )
    for i in range(tasks if contender == "tasks" else 1 if contender == "one task" else 0):
        visadapt.inject(model, m=8, task=f"t{i}", num_classes=CLASSES)
        with torch.no_grad():
            for parameter in visadapt.parameters(model, f"t{i}"):
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    if not visadapt.tasks(model):
        for i in range(1 if contender == "bare backbone" else tasks):
            visadapt.inject(model, visadapt.Linear(), task=f"t{i}", num_classes=CLASSES, norms="frozen")
    for task in visadapt.tasks(model).values():
        task.notes["inputs"] = inputs
    return model


def replaced(server: Server, backbone: str, contender: str) -> None:
    """Replace the forward of a server by that of a contender that is not visadapt."""
    if contender not in ("copies", "peft"):
        return
    forward = server._forward
    plain = resolve(f"bundled/{backbone}", **({} if backbone == "resnet50" else {"num_labels": CLASSES})).eval()
    run = _copies(plain) if contender == "copies" else _peft(plain, len(server.pool.names()))

    def logits(batch: Any) -> list[Tensor]:
        names = [item.task for item in batch]
        with torch.no_grad():
            return list(run(batch[0].entry.inputs.collate([item.prepared for item in batch]), names))

    forward._logits = logits  # type: ignore[method-assign]


def _copies(plain: nn.Module) -> Callable[[Any, list[str]], Tensor]:
    networks = [copy.deepcopy(plain) for _ in range(COPIES)]

    def run(inputs: Any, names: list[str]) -> Tensor:
        rows = [int(name[1:]) % COPIES for name in names]
        found: dict[int, Tensor] = {}
        for number in sorted(set(rows)):
            own = [i for i, row in enumerate(rows) if row == number]
            part = {k: v[own] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[own]
            found.update(zip(own, _call(networks[number], part), strict=True))
        return torch.stack([found[i][:CLASSES] for i in range(len(names))])

    return run


def _peft(plain: nn.Module, tasks: int) -> Callable[[Any, list[str]], Tensor]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_modules=["query", "value"])
    model = get_peft_model(plain, config, adapter_name="t0")
    for i in range(1, tasks):
        model.add_adapter(f"t{i}", config)
    model.eval()
    return lambda inputs, names: model(**inputs, adapter_names=names).logits


def _call(model: nn.Module, inputs: Any) -> Tensor:
    out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits


def samples(backbone: str, size: int) -> list[Any]:
    """Make the samples that requests take turns to send."""
    if backbone == "resnet50":
        return [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(16)]
    return [" ".join(["a film about a ship"] * (1 + i % 4)) for i in range(16)]


class Load:
    """Sends requests to a server, each for a task drawn by Zipf's law."""

    def __init__(self, server: Server, inputs: list[Any]) -> None:
        self.server, self.inputs, self.random = server, inputs, Random(0)
        self.names = sorted(server.pool.names(), key=lambda name: int(name[1:]))
        self.weights = [1 / rank for rank in range(1, len(self.names) + 1)]

    async def one(self) -> float:
        """Send a request; return the seconds until its answer."""
        name = self.random.choices(self.names, self.weights)[0]
        start = time.perf_counter()
        await self.server.predict(name, [self.random.choice(self.inputs)])
        return time.perf_counter() - start

    async def single(self, seconds: float) -> float:
        """Send one request after the other; return the median of their seconds."""
        until, times = time.perf_counter() + seconds, []
        while len(times) < 3 or time.perf_counter() < until:
            times.append(await self.one())
        return statistics.median(times)

    async def saturated(self, seconds: float, waiting: int) -> float:
        """Keep so many requests waiting; return the answers per second."""
        until, answered = time.perf_counter() + seconds, 0

        async def client() -> None:
            nonlocal answered
            while time.perf_counter() < until:
                await self.one()
                answered += 1

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(waiting)))
        return answered / (time.perf_counter() - start)

    async def open_loop(self, seconds: float, rate: float) -> list[float]:
        """Send requests at random times at a mean rate, however long the answers take; return their seconds."""
        until, sent = time.perf_counter() + seconds, []
        while time.perf_counter() < until:
            sent.append(asyncio.create_task(self.one()))
            await asyncio.sleep(self.random.expovariate(rate))
        return list(await asyncio.gather(*sent))


async def measured(server: Server, load: Load, until: float, batch: int) -> Iterator[tuple[str, float, str]]:
    """Measure one contender until about that time."""
    await load.saturated(0.1, batch)
    left = max(1.0, until - time.perf_counter())
    single = await load.single(0.1 * left)
    rate = await load.saturated(0.35 * left, 2 * batch)
    times = sorted(await load.open_loop(0.4 * left, rate / 2))
    quantiles = {share: times[min(len(times) - 1, int(share / 100 * len(times)))] for share in (50, 95, 99)}
    figures = [("throughput", rate, "/s"), ("single request", 1e3 * single, "ms")]
    figures += [(f"p{share} at half load", 1e3 * value, "ms") for share, value in quantiles.items()]
    figures.append(("memory", resident() / 1e6, "MB"))
    return iter(figures)


def resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def contend(backbone: str, contender: str, args: argparse.Namespace, until: float) -> None:
    """Measure one contender and print its figures as lines of JSON; the work of one process."""
    server = Server(
        build(backbone, contender, args.tasks, args.size), max_batch=args.batch, limits=Limits(queue=100_000)
    )
    replaced(server, backbone, contender)

    async def main() -> list[tuple[str, float, str]]:
        async with server:
            return list(await measured(server, Load(server, samples(backbone, args.size)), until, args.batch))

    for figure in asyncio.run(main()):
        print(json.dumps(figure), flush=True)


def rows_of(args: argparse.Namespace) -> list[dict[str, str]]:
    """Measure all contenders, each in its own process, within the budget."""
    jobs = [(b, c) for b in ("resnet50", "minilm") for c in CONTENDERS if c != "peft" or b == "minilm"]
    jobs = [job for job in jobs if job[1] != "peft" or available("peft")]
    end, rows = time.perf_counter() + args.budget, []
    for done, (backbone, contender) in enumerate(jobs):
        seconds = (end - time.perf_counter()) / (len(jobs) - done)
        options = [f"--{name}={getattr(args, name)}" for name in ("tasks", "size", "batch", "budget")]
        command = [sys.executable, "-m", "benchmarks.serving", *options, "--job", f"{backbone}:{contender}:{seconds}"]
        print(backbone, contender, file=sys.stderr, flush=True)
        root = Path(__file__).parents[1]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root).stdout
        size = f"{args.size} px" if backbone == "resnet50" else "up to 64 tokens"
        tasks = 1 if contender in ("bare backbone", "one task") else args.tasks
        for line in output.splitlines():
            figure, value, unit = json.loads(line)
            facts = (backbone, contender, figure, f"{value:.6g}", unit, str(tasks), f"batch {args.batch}, {size}")
            versions = (str(torch.get_num_threads()), torch.__version__)
            rows.append(dict(zip(COLUMNS, (*facts, *versions), strict=True)))
    return rows


def section(rows: list[dict[str, str]]) -> str:
    """Make the section of docs/performance.md."""
    parts = ["## Serving", "Made by `python -m benchmarks.serving`; requests name tasks by Zipf's law, and latencies "
             "are those at half of the contender's own throughput, with Poisson arrivals."]  # fmt: skip
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        own = [row for row in rows if row["backbone"] == backbone]
        values = {(row["contender"], row["figure"]): float(row["value"]) for row in own}
        names = list(dict.fromkeys(row["contender"] for row in own))
        figures = list(dict.fromkeys((row["figure"], row["unit"]) for row in own))
        cells = []
        for name in names:
            tasks = next(row["tasks"] for row in own if row["contender"] == name)
            described = f"{tasks} {CONTENDERS[name]}" if name == "tasks" else CONTENDERS[name]
            cells.append((described, *(f"{values[name, figure]:,.1f} {unit}" for figure, unit in figures)))
        parts.append(f"### {backbone}, {own[0]['setting']}, {own[0]['threads']} threads, torch {own[0]['torch']}")
        parts.append(Table(("contender", *(figure for figure, _ in figures)), cells).markdown())
        throughput = values["tasks", "throughput"] / values["bare backbone", "throughput"]
        memory = values["tasks", "memory"] / values["bare backbone", "memory"]
        waiting = values["tasks", "p95 at half load"] / values["tasks", "single request"]
        parts.append(
            f"Mixed tasks / bare backbone: throughput {throughput:.2f} × (goal ≥ 0.80), memory {memory:.2f} × (goal ≤ "
            f"1.30); p95 at half load / a single request: {waiting:.2f} × (goal ≤ 3)."
        )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tasks": 64, "size": 96, "batch": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--budget", type=float, default=240, help="seconds for all contenders together")
    version = torch.__version__.partition("+")[0]
    default_out = Path(__file__).parent / "results" / f"serving-cpu-float32-torch{version}.csv"
    parser.add_argument("--out", type=Path, default=default_out, help="CSV file; the section is written beside it")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.job:
        started = time.perf_counter()
        backbone, contender, seconds = args.job.split(":")
        # what starting Python and torch has taken
        contend(backbone, contender, args, started + float(seconds) - time.process_time())
        return
    rows = rows_of(args)
    with replacing(args.out) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    with replacing(args.out.with_suffix(".md")) as partial:
        partial.write_text(section(rows), encoding="utf-8")
    print(section(rows))


if __name__ == "__main__":
    main()
