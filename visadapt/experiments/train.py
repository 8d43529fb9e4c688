"""One training run: a contender's task on the training data of a problem."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.errors import VisadaptError
from visadapt.experiments.contenders import Contender
from visadapt.experiments.linear_probe import fit_head, is_probe
from visadapt.experiments.problems import Problem
from visadapt.experiments.record import KEPT
from visadapt.files import make_folder
from visadapt.frozen import CachedPrefix, cache_prefix
from visadapt.runtime.costs import summary
from visadapt.runtime.registry import tasks
from visadapt.task_file import load, save
from visadapt.training import evaluate, fit


@dataclass(frozen=True)
class Workspace:
    """The folder and the device that runs use.

    Attributes:
        folder: folder of the results; task files for later runs are in its subfolder ``tasks``. All processes must have
            access to it.
        device: device to compute on.
        progress: show a progress bar per training run on a terminal.
        regime: name that results carry; see `visadapt.experiments.Result`.
        deadline: value of ``time.time()`` from which no run is begun.
    """

    folder: Path
    device: str = "cpu"
    progress: bool = False
    regime: str | None = None
    deadline: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed, so that no further run is begun."""
        return self.deadline is not None and time.time() >= self.deadline

    def task_file(self, key: str) -> Path:
        """Return the path of the task file of this key; create its folder."""
        folder = self.folder / "tasks"
        make_folder(folder)
        return folder / f"{key}.visadapt"


def train(model: nn.Module, problem: Problem, contender: Contender, seed: int, workspace: Workspace) -> float:
    """Train in place the task that `Contender.put` added.

    A linear probe is trained on cached features. For images that are not augmented, the part of the network below the
    first trained module is also run only once, and its outputs are cached if they fit in memory. The task's notes say
    which epoch a validated contender kept.

    Returns:
        The duration in seconds.

    Raises:
        Diverged: training ended in numbers that are not finite.
    """
    task, data, recipe = problem.name, problem.splits.train, contender.recipe
    if recipe.compile == "graphs" and torch.device(workspace.device).type != "cuda":
        recipe = recipe.replace(compile=None)  # the same steps, one kernel at a time
    start = time.perf_counter()
    options: dict[str, Any] = {"seed": seed, "device": workspace.device, "progress": workspace.progress}
    validation = problem.splits.validation if contender.validated else None
    if validation is not None:
        options["metric"] = problem.metric
    if is_probe(model, task):
        fit_head(model, task, data, recipe, validation=validation, prepare=problem.prepare, **options)
        return time.perf_counter() - start
    augment = problem.augmentation()
    # rows of a cache are of one set of samples
    cached = None if augment is not None or validation is not None else _cached(model, problem, recipe.fast, workspace)
    if cached is None:
        history = fit(model, task, data, validation, recipe, prepare=problem.prepare, augment=augment, **options)
        if validation is not None:
            tasks(model)[task].notes[KEPT] = history.best
    else:
        try:
            fit(model, task, (cached.rows, data.labels), None, recipe, prepare=cached, **options)
        finally:
            cached.prefix.close()
    return time.perf_counter() - start


def _cached(model: nn.Module, problem: Problem, fast: bool, workspace: Workspace) -> CachedPrefix | None:
    """Cache the feature maps below the first trained module; None if there are none or they do not fit in memory.

    A recipe that is ``fast`` computes in bf16, and so does its cache.

    Texts are padded per batch, so theirs are not cached.
    """
    if problem.modality != "image":
        return None
    model.to(workspace.device)

    def prepare(batch: Tensor) -> Any:
        return problem.prepare(batch.to(workspace.device))

    try:
        with torch.autocast(torch.device(workspace.device).type, torch.bfloat16, enabled=fast):
            return cache_prefix(model, problem.name, problem.splits.train.inputs, prepare=prepare, limit=2e8)
    except VisadaptError:
        return None


def measure(model: nn.Module, task: str, problem: Problem, split: str, workspace: Workspace) -> float:
    """Return a task's score on the ``test`` or the ``validation`` split of a problem."""
    data = getattr(problem.splits, split)
    metric = problem.metric
    return evaluate(model, task, data, (metric,), prepare=problem.prepare, device=workspace.device)[metric]


def save_task(model: nn.Module, task: str, file: Path, seconds: float) -> Path:
    """Write a task file with the duration of the training run in its notes."""
    return save(model, task, file, notes={"seconds": seconds})


def load_task(model: nn.Module, file: Path) -> float:
    """Load a task file into a model, and return the duration of its training run in seconds."""
    task = load(model, file)
    return float(tasks(model)[task].notes["seconds"])


def costs(model: nn.Module, task: str, seconds: float, file: Path | None = None) -> dict[str, int]:
    """Count a task's parameters, ``trained`` and in the ``head``, the ``backbone``'s, and the ``bytes`` of its file.

    Args:
        model: the model.
        task: name of the task.
        seconds: duration of the training run.
        file: the task's file; if it does not exist, one is written for a moment.
    """
    table = summary(model)
    row = table[task]
    if file is not None and file.is_file():
        size = file.stat().st_size
    else:
        with tempfile.TemporaryDirectory() as folder:
            size = save_task(model, task, Path(folder) / "task.visadapt", seconds).stat().st_size
    return {"trained": row.adapters + row.norms, "head": row.head, "backbone": table.backbone, "bytes": size}
