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
import torchvision

import visadapt
from benchmarks.measure import Row, exact, milliseconds, parse_args, print_rows


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
    net = torchvision.models.resnet50(weights=None)
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
    yield milliseconds("save", setting, seconds(lambda _: visadapt.save(model, "first", file), repeats))
    yield milliseconds("switch", setting, seconds(lambda _: visadapt.activate(model, "first"), repeats))


if __name__ == "__main__":
    args = parse_args(__doc__, tasks=1000, repeats=15)
    with tempfile.TemporaryDirectory() as folder:
        print_rows(measure(args.tasks, args.repeats, Path(folder)))
