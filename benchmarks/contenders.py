"""What the benchmark of serving compares, each in a process of its own that answers in Python and over HTTP.

A contender is a server; those that are not visadapt replace its forward, and share everything else with it.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import visadapt
from benchmarks.load import Load, quantile
from visadapt.data.hub import resolve
from visadapt.optional import available, require
from visadapt.serving import Limits, Server
from visadapt.serving.forward import Forward
from visadapt.serving.preparing import prepare
from visadapt.serving.samples import accept
from visadapt.serving.waiting import Item

CLASSES = 10
SIZES = (1, 2, 4, 8, 16, 32)
"""Sizes of the batches whose forward is timed."""

CONTENDERS = {
    "bare backbone": "the backbone with a head, in the same server",
    "one task": "one task of Bottleneck(m=8)",
    "tasks": "tasks of Bottleneck(m=8), mixed in each batch",
    "merged": "one merged network per task, as many as fit into a quarter of the free memory",
    "peft": "peft LoRA r=8, mixed in each batch by adapter_names",
}
"""`Bottleneck` with its activation does not merge: the merged networks are of ``Bottleneck(m=8, activation=None)``."""


def plain(backbone: str) -> nn.Module:
    """Build a bundled backbone in eval mode."""
    return resolve(f"bundled/{backbone}", **({} if backbone == "resnet50" else {"num_labels": CLASSES})).eval()


def build(backbone: str, contender: str, tasks: int, size: int) -> nn.Module:
    """Build the backbone with the tasks of a contender, moved away from the identity."""
    model = plain(backbone)
    inputs = (
        {"kind": "images", "size": size}
        if backbone == "resnet50"
        else {"kind": "texts", "tokenizer": "bundled/minilm", "length": 64}
    )
    own = contender in ("one task", "tasks")
    for i in range(tasks):
        method = visadapt.Bottleneck(m=8) if own else visadapt.Linear()
        visadapt.inject(model, method, task=f"t{i}", num_classes=CLASSES, norms="affine" if own else "frozen")
        visadapt.tasks(model)[f"t{i}"].notes["inputs"] = inputs
        with torch.no_grad():
            for parameter in visadapt.parameters(model, f"t{i}"):
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model


def samples(backbone: str, size: int) -> list[Any]:
    """Make the inputs that requests take turns to send: images, or texts of 7 to 22 tokens."""
    if backbone == "resnet50":
        return [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(16)]
    return [" ".join(["a film about a ship"] * (1 + i % 4)) for i in range(16)]


def replace(server: Server, backbone: str, contender: str, device: str) -> int:
    """Replace the forward of a server by that of a contender that is not visadapt; return its networks in memory."""
    if contender not in ("merged", "peft"):
        return 1
    tasks, forward = len(server.pool.names()), server._forward
    networks: list[nn.Module] = []
    if contender == "merged":
        networks = merged(backbone, tasks, device)
        run = by_network(networks)
    else:
        run = by_peft(plain(backbone), tasks, device)

    def logits(batch: Any) -> list[Tensor]:
        inputs = batch[0].entry.inputs.collate([item.prepared for item in batch])
        with torch.no_grad():
            return list(run(_moved(inputs, device), [item.task for item in batch]).float().cpu())

    forward._logits = logits  # type: ignore[method-assign]
    return max(1, len(networks))


def merged(backbone: str, tasks: int, device: str) -> list[nn.Module]:
    """Build merged networks, as many as fit into a quarter of the free memory; further tasks share them."""
    model = plain(backbone)
    visadapt.inject(model, visadapt.Bottleneck(m=8, activation=None), task="t0", num_classes=CLASSES)
    first = visadapt.merge(model, "t0").eval().to(device)
    size = sum(tensor.nbytes for tensor in first.state_dict().values())
    count = max(1, min(tasks, int(free(device) / 4 / size)))
    # values do not matter to time and memory
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def free(device: str) -> int:
    """Bytes of memory that are free on a device."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return _kilobytes("/proc/meminfo", "MemAvailable")


def by_network(networks: list[nn.Module]) -> Callable[[Any, list[str]], Tensor]:
    """Return a forward that runs each task's samples by its own network."""

    def run(inputs: Any, names: list[str]) -> Tensor:
        rows = [int(name[1:]) % len(networks) for name in names]
        found: dict[int, Tensor] = {}
        for number in sorted(set(rows)):
            own = [i for i, row in enumerate(rows) if row == number]
            part = {k: v[own] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[own]
            out = networks[number](**part) if isinstance(part, dict) else networks[number](part)
            found.update(zip(own, getattr(out, "logits", out), strict=True))
        return torch.stack([found[i] for i in range(len(names))])

    return run


def by_peft(model: nn.Module, tasks: int, device: str) -> Callable[[Any, list[str]], Tensor]:
    """Return peft's forward of a batch of several adapters."""
    peft = require("peft", "peft's contender", "peft")
    config = peft.LoraConfig(r=8, target_modules=["query", "value"])
    model = peft.get_peft_model(model, config, adapter_name="t0")
    for i in range(1, tasks):
        model.add_adapter(f"t{i}", config)
    model.eval().to(device)

    def run(inputs: Any, names: list[str]) -> Tensor:
        logits: Tensor = model(**inputs, adapter_names=names).logits
        return logits

    return run


def _moved(batch: Any, device: str) -> Any:
    return {key: value.to(device) for key, value in batch.items()} if isinstance(batch, dict) else batch.to(device)


def forward_seconds(forward: Forward, tasks: int, inputs: list[Any], most: int, seconds: float) -> dict[int, float]:
    """Time the forward of batches of several sizes, each at least twice; return the fastest of each."""
    entries = [forward.pool.entry(f"t{i}") for i in range(tasks)]
    sizes, found, until = [size for size in SIZES if size <= most], {}, time.perf_counter() + seconds
    for repeat in range(1000):
        for size in sizes:
            chosen = [(entries[i % tasks], accept(inputs[i % len(inputs)], Limits())) for i in range(size)]
            batch = [Item(e.name, sample, e, prepare(e, sample, Limits())) for e, sample in chosen]
            start = time.perf_counter()
            forward.answer(batch)
            took = time.perf_counter() - start
            found[size] = min(found.get(size, took), took)
        if repeat and time.perf_counter() > until:
            break
    return found


def memory(device: str) -> float:
    """MB that this process holds: on a GPU, the most that was allocated there."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    return _kilobytes("/proc/self/status", "VmRSS") / 1e6


def _kilobytes(file: str, field: str) -> int:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


class Child:
    """The process of one contender, which obeys the lines of JSON that it reads.

    Args:
        args: of its command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        model = build(args.backbone, args.contender, args.tasks, args.size)
        self.server = Server(model, max_batch=args.batch, device=args.device, limits=Limits(queue=100_000))
        self._inputs = samples(args.backbone, args.size)
        self._load = Load(self._ask, args.tasks, len(self._inputs))

    async def _ask(self, task: str, number: int) -> None:
        await self.server.predict(task, [self._inputs[number]])

    async def serve(self) -> None:
        """Answer until the input ends."""
        async with self.server:
            networks = replace(self.server, self._args.backbone, self._args.contender, self._args.device)
            # a task's first request also finds what it shares with the others, which a server of many hours does once
            await asyncio.gather(*(self._ask(f"t{i}", i % len(self._inputs)) for i in range(self._args.tasks)))
            port, stop = await self._listen()
            _say({"port": port, "networks": networks})
            loop = asyncio.get_running_loop()
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                _say(await self._obey(**json.loads(line)))
            await stop()

    async def _listen(self) -> tuple[int | None, Callable[[], Any]]:
        async def nothing() -> None:
            pass

        if not available("fastapi") or not available("uvicorn"):
            return None, nothing
        app = require("visadapt.serving.app", "serving", "visadapt[serve]")
        service = require("visadapt.serving.service", "serving", "visadapt[serve]").LocalService(self.server)
        uvicorn = require("uvicorn", "serving", "visadapt[serve]")
        config = uvicorn.Config(
            app.build_app(service), port=0, log_level="error", lifespan="off", interface="asgi3", timeout_keep_alive=600
        )
        http = uvicorn.Server(config)
        running = asyncio.create_task(http.serve())
        while not http.started:
            await asyncio.sleep(0.01)

        async def stop() -> None:
            http.should_exit = True
            await running

        return http.servers[0].sockets[0].getsockname()[1], stop

    async def _obey(self, do: str, **options: Any) -> Any:
        if do == "saturate":
            return await self._load.saturated(options["seconds"], 2 * self._args.batch)
        if do == "open loop":
            times = await self._load.open_loop(options["seconds"], options["rate"])
            return [quantile(times, share) for share in options["shares"]]
        if do == "forward":
            run = forward_seconds, self.server._forward, self._args.tasks, self._inputs, self._args.batch
            return await asyncio.get_running_loop().run_in_executor(None, *run, options["seconds"])
        return memory(self._args.device)


def _say(value: Any) -> None:
    print(json.dumps(value), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=("resnet50", "minilm"))
    parser.add_argument("contender", choices=list(CONTENDERS))
    for name, default in {"tasks": 64, "size": 96, "batch": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    asyncio.run(Child(args).serve())


if __name__ == "__main__":
    main()
