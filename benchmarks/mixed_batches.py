"""A mixed batch: n tasks in a batch of n / the same batch with one task; n side networks on one image / one.

python -m benchmarks.mixed_batches --tasks 8
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import torch
import torchvision
from torch import nn
from torch._dynamo.testing import CompileCounter

import visadapt
from benchmarks.measure import Row, exact, interleaved, operations, parse_args, print_rows, ratio, resnet50


def build(tasks: int, norms: str) -> nn.Module:
    """Build ResNet-50 with that many tasks, each with its own head and perturbed away from the identity."""
    model = resnet50()
    for i in range(tasks):
        visadapt.inject(model, m=32, task=f"task{i}", num_classes=10, norms=norms)
        with torch.no_grad():
            for p in visadapt.parameters(model, f"task{i}"):
                p.add_(torch.randn_like(p), alpha=0.01)
    return model.eval()


def measure(tasks: int, size: int, repeats: int, device: str) -> Iterator[Row]:
    """Measure both norm policies that mixed batches support."""
    setting = f"ResNet-50, m=32, {size} px"
    x = torch.randn(tasks, 3, size, size, device=device)
    runs: dict[str, Callable[[], object]] = {}
    bare: dict[str, Callable[[], object]] = {}
    for norms in ("affine", "frozen"):
        model = build(tasks, norms).to(device)

        def run(task: str | list[str] | None, model: nn.Module = model) -> None:
            with visadapt.using(model, task):
                model(x)

        runs[f"one, {norms}"] = lambda run=run: run("task0")
        runs[f"mixed, {norms}"] = lambda run=run: run([f"task{i}" for i in range(tasks)])
        bare[norms] = lambda run=run: run(None)
    with torch.no_grad():
        times = interleaved(runs, repeats, device)
        passes = {"": runs["mixed, affine"], ", one task": runs["one, affine"], ", bare backbone": bare["affine"]}
        shares = {name: outside(run) for name, run in passes.items()}
    for name, share in shares.items():
        yield exact(f"mixed: time outside torch's operators{name}", f"{setting}, {tasks} tasks", share, "%")
    for norms, own in (("affine", ", own norms"), ("frozen", "")):
        figure = f"mixed: {tasks} tasks in a batch of {tasks} / one task{own}"
        yield ratio(figure, setting, times, f"mixed, {norms}", f"one, {norms}")
    yield from one_image(tasks, repeats, device)
    if tasks == 8:
        figure = "mixed: graphs compiled for 100 random batches"
        yield exact(figure, "ResNet-18, m=8, 8 tasks in batches of 8, 32 px", graphs(tasks), "")


def one_image(tasks: int, repeats: int, device: str, size: int = 224) -> Iterator[Row]:
    """Measure many side networks on one image, at a small and at the default width, beside one of them."""
    x = torch.randn(1, 3, size, size, device=device)
    names = [f"task{i}" for i in range(tasks)]
    for m in (8, 64):
        model = resnet50()
        for name in names:
            visadapt.inject(model, visadapt.Ladder(m=m), task=name, num_classes=10)
        model.eval().to(device)

        def run(task: str | list[str], model: nn.Module = model) -> None:
            with visadapt.using(model, task):
                model(x)

        runs: dict[str, Callable[[], object]] = {"one": lambda run=run: run("task0"), "all": lambda run=run: run(names)}
        figure, setting = f"{tasks} tasks on one image by Ladder / one task", f"ResNet-50, m={m}, {size} px"
        with torch.no_grad():
            runs["all"]()  # finds out where the tasks part
            yield exact(f"operations: {figure}", setting, operations(runs["all"]) / operations(runs["one"]))
            yield ratio(f"mixed: {figure}", setting, interleaved(runs, repeats, device), "all", "one")


def outside(run: Callable[[], object]) -> float:
    """Return the percentage of a run's time that is spent outside torch's operators, in Python above all."""
    with torch.profiler.profile() as profiler:
        start = time.perf_counter()
        run()
        whole = time.perf_counter() - start
    return 100 * (1 - 1e-6 * sum(event.self_cpu_time_total for event in profiler.key_averages()) / whole)


def graphs(tasks: int, batches: int = 100) -> int:
    """Count the graphs that `torch.compile` makes for random batches of one size."""
    model = torchvision.models.resnet18(weights=None)
    for i in range(tasks):
        visadapt.inject(model, m=8, task=f"task{i}", num_classes=10)
    model.eval()
    torch._dynamo.reset()
    counter, draw = CompileCounter(), random.Random(0)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    names = [f"task{i}" for i in range(tasks)]
    x = torch.randn(tasks, 3, 32, 32)
    with torch.no_grad():
        with visadapt.using(model, names):
            model(x)  # shows which rows belong to which sample
        for _ in range(batches):
            with visadapt.using(model, draw.choices(names, k=tasks)):
                compiled(x)
    return counter.frame_count


if __name__ == "__main__":
    args = parse_args(__doc__, tasks=8, size=96, repeats=11)
    print_rows(measure(args.tasks, args.size, args.repeats, args.device))
