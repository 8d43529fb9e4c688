"""Time to inject, activate, save and load tasks, on a model without other tasks and with a thousand.

python -m benchmarks.bookkeeping
"""

from __future__ import annotations

import copy
import cProfile
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import visadapt
from benchmarks.measure import Row, exact, interleaved, milliseconds, parse_args, print_rows, ratio, resnet50
from visadapt.runtime.registry import registry_of


def seconds(run: Callable[[Any], object], repeats: int, prepare: Callable[[], Any] = lambda: None) -> list[float]:
    """Time each run in seconds, after one warm-up run; ``prepare`` returns its argument and is not timed."""
    times = []
    for _ in range(repeats + 1):
        argument = prepare()
        start = time.perf_counter()
        run(argument)
        times.append(time.perf_counter() - start)
    return times[1:]


def profile_callees(
    run: Callable[[], object], caller: Callable[..., object], least: float = 3
) -> Iterator[tuple[str, float]]:
    """Profile a run, and return the functions that ``caller`` calls with at least ``least`` % of its time."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    code = caller.__code__  # type: ignore[attr-defined]
    key = (code.co_filename, code.co_firstlineno, code.co_name)
    shares = {
        callee[2]: 100 * callers[key][3] / stats[key][3] for callee, (*_, callers) in stats.items() if key in callers
    }
    return ((name, share) for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share >= least)


def import_seconds() -> float:
    """Time the import of visadapt in a new interpreter, in seconds, without the import of torch."""
    code = "import time, torch; start = time.perf_counter(); import visadapt; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure(tasks: int, repeats: int, folder: Path) -> Iterator[Row]:
    """Measure all figures."""
    net = resnet50()
    inject = seconds(lambda m: visadapt.inject(m, m=32, num_classes=10), repeats, lambda: copy.deepcopy(net))
    yield milliseconds("inject", "ResNet-50, m=32, the first task", inject)
    file = folder / "task.visadapt"
    model = visadapt.inject(copy.deepcopy(net), m=32, task="first", num_classes=10)
    tensor_bytes = sum(t.numel() * t.element_size() for t in visadapt.parameters(model, "first"))
    visadapt.save(model, "first", file)
    yield exact("task file / bytes of its tensors", "ResNet-50, m=32, 10 classes", file.stat().st_size / tensor_bytes)
    first_load = seconds(lambda m: visadapt.load(m, file), repeats, lambda: copy.deepcopy(net))
    yield milliseconds("load onto a backbone seen for the first time", "ResNet-50, m=32", first_load)
    for number in range(1, tasks):
        visadapt.inject(model, m=1, task=f"task{number}", num_classes=10, norms="frozen")
        if number == 1 or number == tasks - 1:
            yield from _measure_beside(model, number + 1, repeats, file)
    import_seconds()  # warms up the disk cache
    yield milliseconds("import visadapt", "beyond torch", [import_seconds() for _ in range(min(repeats, 5))])


def _measure_beside(model: torch.nn.Module, tasks: int, repeats: int, file: Path) -> Iterator[Row]:
    setting = f"ResNet-50, m=32, beside {tasks} tasks"

    def remove_new() -> str:
        if "new" in visadapt.tasks(model):
            visadapt.remove(model, "new")
        return "new"

    inject = seconds(lambda name: visadapt.inject(model, m=32, task=name), repeats, remove_new)
    yield milliseconds("inject one more", setting, inject)
    load = seconds(lambda name: visadapt.load(model, file, task=name), repeats, remove_new)
    yield milliseconds("load", setting, load)
    for name, share in profile_callees(lambda: visadapt.load(model, file, task=remove_new()), visadapt.load):
        yield exact(f"profile: load: {name}", setting, share, "%")
    remove_new()
    yield from _measure_calls(model, resnet50(), setting, repeats)
    yield milliseconds("save", setting, seconds(lambda _: visadapt.save(model, "first", file), repeats))
    yield milliseconds("switch", setting, seconds(lambda _: visadapt.activate(model, "first"), repeats))


_CALLS: dict[str, Callable[[torch.nn.Module], object]] = {
    "train()": lambda model: model.train(),
    "zero_grad()": lambda model: model.zero_grad(),
    "named_parameters()": lambda model: list(model.named_parameters()),
    "modules()": lambda model: list(model.modules()),
    "state_dict()": lambda model: model.state_dict(),
    "to() where it is": lambda model: model.to(next(model.parameters()).device),
}


def _measure_calls(model: torch.nn.Module, plain: torch.nn.Module, setting: str, repeats: int) -> Iterator[Row]:
    """Compare the calls that visit all modules with those of a plain model, the bare backbone and a task active."""
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for active in (None, "first"):
            visadapt.activate(model, active)
            at = f"{setting}, {'no task' if active is None else 'one task'} active"
            for name, call in _CALLS.items():
                times = interleaved({"tasks": lambda c=call: c(model), "plain": lambda c=call: c(plain)}, repeats)  # type: ignore[misc]
                yield ratio(f"call: {name} / plain", at, times, "tasks", "plain")
            forwards = {"tasks": lambda: model.eval()(x), "plain": lambda: plain.eval()(x)}
            yield ratio("call: forward / plain", at, interleaved(forwards, repeats), "tasks", "plain")
        copies = {"tasks": lambda: copy.deepcopy(model), "plain": lambda: copy.deepcopy(plain)}
        yield ratio("call: deepcopy / plain", setting, interleaved(copies, min(repeats, 3)), "tasks", "plain")
        names = tuple(visadapt.tasks(model))[:500]
        inputs = {name: [torch.randn(4, 3, 64, 64)] for name in names[:2]}
        if len(names) > 1:
            _decide_among(model, names, inputs)
            choose = {
                "auto": lambda: _forward(model, "auto", x),
                "decide": lambda: visadapt.decide(model, x),
                "plain": lambda: plain(x),
            }
            times = interleaved(choose, repeats)
            at = f"ResNet-50, 224 px, batch 1, {len(names)} tasks"
            yield ratio("call: auto / plain forward", at, times, "auto", "plain")
            yield ratio("call: decide / plain forward", at, times, "decide", "plain")


def _decide_among(model: torch.nn.Module, names: tuple[str, ...], inputs: dict[str, list[torch.Tensor]]) -> None:
    """Give a model a decider between many tasks, of which two are fitted."""
    two = visadapt.fit_decider(model, inputs, steps=1)
    decider = type(two)(names, two.mean, two.std)
    torch.nn.init.normal_(decider.linear.weight, std=0.01)
    registry_of(model).decider = decider.requires_grad_(False).eval()


def _forward(model: torch.nn.Module, task: str, x: torch.Tensor) -> torch.Tensor:
    with visadapt.using(model, task):
        logits: torch.Tensor = model(x)
    return logits


if __name__ == "__main__":
    args = parse_args(__doc__, tasks=1000, repeats=15)
    with tempfile.TemporaryDirectory() as folder:
        print_rows(measure(args.tasks, args.repeats, Path(folder)))
