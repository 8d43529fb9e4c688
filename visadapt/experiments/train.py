"""One training: a contender's task, trained on a problem without looking at any but its training data."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visadapt.errors import VisadaptError
from visadapt.experiments.contenders import Contender
from visadapt.experiments.linear_probe import fit_head, is_probe
from visadapt.experiments.problems import Problem
from visadapt.frozen import CachedPrefix, cache_prefix
from visadapt.runtime.costs import summary
from visadapt.runtime.registry import tasks
from visadapt.task_file import load, save
from visadapt.training import evaluate, fit


@dataclass(frozen=True)
class Workplace:
    """Where runs are made.

    Attributes:
        folder: of the results; task files that later runs start from lie in its folder ``tasks``. Every process that
            works there must see it.
        device: that is computed on.
        progress: whether trainings show a bar on a terminal.
    """

    folder: Path
    device: str = "cpu"
    progress: bool = False

    def task_file(self, key: str) -> Path:
        """The task file of the training of that key; its folder is there."""
        folder = self.folder / "tasks"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{key}.visadapt"


def train(model: nn.Module, problem: Problem, contender: Contender, seed: int, workplace: Workplace) -> float:
    """Trains the task that :meth:`Contender.put` made, in place.

    A linear probe is trained on features that are computed once. So is, for images, what lies above the first part
    that is trained; where nothing lies below it, the whole network is run in every step.

    Returns:
        Seconds that it took.

    Raises:
        VisadaptError: the training diverged.
    """
    task, data, recipe = problem.name, problem.splits.train, contender.recipe
    start = time.perf_counter()
    options: dict[str, Any] = {"seed": seed, "device": workplace.device, "progress": workplace.progress}
    if is_probe(model, task):
        fit_head(model, task, data, recipe, prepare=problem.prepare, **options)
        return time.perf_counter() - start
    cached = _cached(model, problem, workplace)
    if cached is None:
        fit(model, task, data, None, recipe, prepare=problem.prepare, **options)
    else:
        try:
            fit(model, task, (cached.rows, data.labels), None, recipe, prepare=cached, **options)
        finally:
            cached.prefix.close()
    return time.perf_counter() - start


def _cached(model: nn.Module, problem: Problem, workplace: Workplace) -> CachedPrefix | None:
    """The maps below the first part that is trained; None where that is the stem, or where they are too many to keep.

    Texts are cut to the longest of each batch, so theirs are not kept.
    """
    if problem.modality != "image":
        return None
    model.to(workplace.device)

    def prepare(batch: Tensor) -> Any:
        return problem.prepare(batch.to(workplace.device))

    try:
        return cache_prefix(model, problem.name, problem.splits.train.inputs, prepare=prepare, limit=2e8)
    except VisadaptError:
        return None


def measure(model: nn.Module, task: str, problem: Problem, split: str, workplace: Workplace) -> float:
    """A task's score on the ``test`` or the ``validation`` split of a problem."""
    data = getattr(problem.splits, split)
    metric = problem.metric
    return evaluate(model, task, data, (metric,), prepare=problem.prepare, device=workplace.device)[metric]


def keep(model: nn.Module, task: str, file: Path, seconds: float) -> Path:
    """Writes a task's file, which remembers how long the training took."""
    return save(model, task, file, notes={"seconds": seconds})


def kept(model: nn.Module, file: Path) -> float:
    """Reads a task's file into a model, and gives the seconds that it remembers."""
    task = load(model, file)
    return float(tasks(model)[task].notes["seconds"])


def costs(model: nn.Module, task: str, seconds: float) -> dict[str, int]:
    """What a task costs: parameters ``trained`` beside the ``head``, all of the ``backbone``, ``bytes`` of its file."""
    told = summary(model)
    row = told[task]
    with tempfile.TemporaryDirectory() as folder:
        size = keep(model, task, Path(folder) / "task.visadapt", seconds).stat().st_size
    return {"trained": row.adapters + row.norms, "head": row.head, "backbone": told.backbone, "bytes": size}
