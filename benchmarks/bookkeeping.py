"""What putting in, choosing, saving and loading tasks takes, beside none and beside a thousand others.

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
from benchmarks.measure import Row, exact, given, milliseconds, tell


def seconds(run: Callable[[Any], object], repeats: int, prepare: Callable[[], Any] = lambda: None) -> list[float]:
    """Of each run, after one to warm up; ``prepare`` gives it what it works on, and is not measured."""
    found = []
    for _ in range(repeats + 1):
        with_this = prepare()
        start = time.perf_counter()
        run(with_this)
        found.append(time.perf_counter() - start)
    return found[1:]


def shares(run: Callable[[], object], of: Callable[..., object], least: float = 3) -> Iterator[tuple[str, float]]:
    """The functions that ``of`` calls, by their share in % of its time in a run, from ``least`` up."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    code = of.__code__  # type: ignore[attr-defined]
    at = (code.co_filename, code.co_firstlineno, code.co_name)
    found = {key[2]: 100 * callers[at][3] / stats[at][3] for key, (*_, callers) in stats.items() if at in callers}
    return ((name, share) for name, share in sorted(found.items(), key=lambda item: -item[1]) if share >= least)


def importing() -> float:
    """Seconds that a fresh interpreter takes to import visadapt once it has torch."""
    timed = "import time, torch; start = time.perf_counter(); import visadapt; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", timed], stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure(tasks: int, repeats: int, folder: Path) -> Iterator[Row]:
    """All figures."""
    net = torchvision.models.resnet50(weights=None)
    inject = seconds(lambda m: visadapt.inject(m, m=32, num_classes=10), repeats, lambda: copy.deepcopy(net))
    yield milliseconds("inject", "ResNet-50, m=32, the first task", inject)
    file = folder / "task.visadapt"
    model = visadapt.inject(copy.deepcopy(net), m=32, task="first", num_classes=10)
    own = sum(t.numel() * t.element_size() for t in visadapt.parameters(model, "first"))
    visadapt.save(model, "first", file)
    yield exact("task file / bytes of its tensors", "ResNet-50, m=32, 10 classes", file.stat().st_size / own)
    on_fresh = seconds(lambda m: visadapt.load(m, file), repeats, lambda: copy.deepcopy(net))
    yield milliseconds("load onto a backbone seen for the first time", "ResNet-50, m=32", on_fresh)
    for number in range(1, tasks):
        visadapt.inject(model, m=1, task=f"task{number}", num_classes=10, norms="frozen")
        if number == 1 or number == tasks - 1:
            yield from _beside(model, number + 1, repeats, file)
    importing()  # from here on the disk is not what is measured
    yield milliseconds("import visadapt", "beyond torch", [importing() for _ in range(min(repeats, 5))])


def _beside(model: torch.nn.Module, tasks: int, repeats: int, file: Path) -> Iterator[Row]:
    at = f"ResNet-50, m=32, beside {tasks} tasks"

    def without() -> str:
        if "new" in visadapt.tasks(model):
            visadapt.remove(model, "new")
        return "new"

    yield milliseconds("inject one more", at, seconds(lambda n: visadapt.inject(model, m=32, task=n), repeats, without))
    yield milliseconds("load", at, seconds(lambda name: visadapt.load(model, file, task=name), repeats, without))
    for name, share in shares(lambda: visadapt.load(model, file, task=without()), visadapt.load):
        yield exact(f"profile: load: {name}", at, share, "%")
    without()
    yield milliseconds("save", at, seconds(lambda _: visadapt.save(model, "first", file), repeats))
    yield milliseconds("switch", at, seconds(lambda _: visadapt.activate(model, "first"), repeats))


if __name__ == "__main__":
    told = given(__doc__, tasks=1000, repeats=15)
    with tempfile.TemporaryDirectory() as name:
        tell(measure(told.tasks, told.repeats, Path(name)))
