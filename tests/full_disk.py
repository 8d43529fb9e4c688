"""Every writer of the library, on a full disk, without descriptors, in a read-only folder, and interrupted.

The limits are of a whole process, so this is a program of its own: it prints what each writer did as JSON.
``RLIMIT_FSIZE`` stands for a full disk, as it fails in the same calls with and without privileges; a folder of ``/sys``
is one that nobody, root included, can write to.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import visadapt
from visadapt import VisadaptError, experiments, report
from visadapt.experiments import Result
from visadapt.experiments.record import write
from visadapt.export.program import export
from visadapt.training import JsonLines, Recipe, fit

READ_ONLY = Path("/sys/kernel")

RESULT = Result(*("k0", "compare", "image", "net", "data", "who"), 0, "test", "accuracy", 0.5, 1, 1, 9, 1.0, 9, 0.1, 1)


def writers(folder: Path) -> dict[str, tuple[str, Callable[[Path], Any]]]:
    """Name of the file, and what writes it, of each kind."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", channels=(8, 8, 16, 16), num_classes=4).eval()
    for task in "ab":
        visadapt.inject(model, m=2, task=task, num_classes=3, where="layer4", norms="frozen")
    x = torch.randn(4, 3, 32, 32)
    visadapt.fit_decider(model, {"a": [x], "b": [x + 1]}, steps=2)
    data, recipe = (x, torch.arange(4) % 3), Recipe(epochs=1, batch_size=2, head_first=False)
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    eight = torch.randn(2, 3, 8, 8)

    def trained(path: Path, **options: Any) -> None:
        fit(model, "a", data, recipe=recipe, progress=False, **options)

    def sparse(path: Path) -> None:
        visadapt.cache_prefix(model, "a", x.repeat(40, 1, 1, 1), file=path).prefix.close()

    results = experiments.write_csv([RESULT], folder / "results.csv")
    return {
        "task": ("a.visadapt", lambda path: visadapt.save(model, "a", path)),
        "decider": ("decider", lambda path: visadapt.save_decider(model, path)),
        "checkpoint": ("checkpoint", lambda path: trained(path, checkpoint=path)),
        "log": ("log.jsonl", lambda path: trained(path, log=JsonLines(path))),
        "cache": ("features", sparse),
        "table": ("results.csv", lambda path: experiments.write_csv([RESULT] * 20, path)),
        "result": ("compare/k0.json", lambda path: write(RESULT, path.parent.parent)),
        "report": ("page.html", lambda path: report.write(results, path.with_suffix(""))),
        "plot": ("plot.svg", lambda path: report.plot([RESULT], path)),
        "program": ("program.pt2", lambda path: export(small, path, example=eight)),
    }


@contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    before, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (before, hard))


@contextmanager
def full_disk() -> Iterator[None]:
    with limited(resource.RLIMIT_FSIZE, 64):
        yield


@contextmanager
def no_descriptors() -> Iterator[None]:
    with limited(resource.RLIMIT_NOFILE, 0):
        yield


@contextmanager
def interrupted() -> Iterator[None]:
    """Ctrl-C where a file is on its way to the disk."""
    sync = os.fsync

    def interrupt(descriptor: int) -> None:
        os.fsync = sync
        signal.raise_signal(signal.SIGINT)

    os.fsync = interrupt
    try:
        yield
    finally:
        os.fsync = sync


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def outcome(call: Callable[[], Any]) -> str:
    try:
        call()
    except VisadaptError as error:
        return f"VisadaptError: {error}"
    except BaseException as error:  # what must not be, and the interrupt
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder: Path) -> dict[str, dict[str, str]]:
    """What each writer did in each condition; "changed" is added where a file differs from before."""
    found: dict[str, dict[str, str]] = {}
    for name, (file, writer) in writers(folder).items():
        place = folder / name
        path = place / file
        path.parent.mkdir(parents=True, exist_ok=True)
        writer(path)  # what is imported, compiled and traced once, and an old file
        if name in ("checkpoint", "cache"):  # what is there already is taken
            for old in [p for p in place.rglob("*") if p.is_file()]:
                old.unlink()
        found[name] = {}
        for condition in (full_disk, no_descriptors, interrupted):
            before = listing(place)
            with condition():
                said = outcome(lambda path=path, writer=writer: writer(path))
            found[name][condition.__name__] = said + ("" if listing(place) == before else ", and files changed")
        found[name]["read_only"] = outcome(lambda file=file, writer=writer: writer(READ_ONLY / file))
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # a program that is started in the background of a shell ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert threading.active_count() == 1
    print(json.dumps(main(Path(sys.argv[1]))))
