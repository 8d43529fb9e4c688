"""Predict labels and probabilities."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from visadapt.arguments import reading, takes
from visadapt.backbone.modules import own_modules, unwrapped
from visadapt.backbone.trace import input_errors
from visadapt.checks import check_count, is_real
from visadapt.errors import VisadaptError
from visadapt.opening.preparing import listed, preprocess, same_inputs
from visadapt.printable import shown
from visadapt.runtime.choice import AUTO
from visadapt.runtime.decider import decide
from visadapt.runtime.logits import split
from visadapt.runtime.registry import Task, registry_of
from visadapt.runtime.selection import using

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
"""What a task's note ``problem_type`` may be, as transformers names them; the first if there is none."""


@dataclass(frozen=True)
class Prediction:
    """What a task predicts for one input.

    Attributes:
        task: name of the task.
        labels: most likely first; of a regression, the names of its outputs in their order.
        probabilities: of these labels: a softmax over the classes, or a sigmoid each where an input may have several
            labels; empty for a regression.
        values: outputs of a regression; empty otherwise.

    Examples:
        >>> prediction = visadapt.Prediction("flowers", ("lily", "rose"), (0.75, 0.25))
        >>> prediction.label, prediction.probability
        ('lily', 0.75)
    """

    task: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...] = ()
    values: tuple[float, ...] = ()

    @property
    def label(self) -> str | None:
        """The most likely label; None if no label is likely enough, or for a regression."""
        return self.labels[0] if self.labels and self.probabilities else None

    @property
    def probability(self) -> float | None:
        """Probability of ``label``."""
        return self.probabilities[0] if self.probabilities else None


@takes()
def predict(
    model: nn.Module,
    inputs: Any,
    task: str | Sequence[str] | None = None,
    *,
    top: int | None = None,
    threshold: float = 0.5,
    batch_size: int = 32,
) -> list[Prediction]:
    """Predict labels and probabilities of images or texts.

    The model runs in eval mode without gradients, on its own device; its modes are restored afterwards.

    Args:
        model: an injected model, such as `visadapt.open` returns.
        inputs: images of Pillow, paths of images or texts: one or a sequence. Or a batch as the model takes it: a
            float tensor ``(N, …)``, or a dict of tensors.
        task: name of the task; a list with one name per input; ``"auto"`` for the decider's choice per input; None for
            the active task.
        top: number of labels per input. None for the most likely class or, where an input may have several labels,
            those with a probability of at least ``threshold``.
        threshold: see ``top``.
        batch_size: inputs per forward pass.

    Returns:
        One prediction per input, in their order. The task's note ``problem_type`` says what its outputs are:
        ``"single_label_classification"`` (the default), ``"multi_label_classification"`` or ``"regression"``.

    Raises:
        VisadaptError: the model has no such task; an input cannot be read; the list of tasks has another length than
            the inputs; a logit is NaN or infinite.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3, labels=["iris", "lily", "rose"])
        >>> found = visadapt.predict(model, torch.randn(2, 3, 32, 32), "flowers", top=3)
        >>> len(found), sorted(found[0].labels)
        (2, ['iris', 'lily', 'rose'])
        >>> round(sum(found[0].probabilities), 3)
        1.0
    """
    check_count(batch_size, "batch_size")
    if top is not None:
        check_count(top, "top")
    if not is_real(threshold) or not 0 <= threshold <= 1:
        raise VisadaptError(f"threshold must be a probability in [0, 1], got {threshold!r}")
    ready = isinstance(inputs, Tensor | Mapping)
    raw = inputs if ready else listed(inputs)
    count = _length(raw)
    names = _names(model, task, count)
    known = _decided(model) if names is None else tuple(dict.fromkeys(names))
    if names is None and not ready and same_inputs(model, known) is None:
        raise VisadaptError(
            f"task='auto' needs tasks that prepare their inputs alike, but {', '.join(map(repr, known))} differ"
        )
    results: list[Prediction | None] = [None] * count
    with torch.no_grad(), evaluating(model, known):
        for rows in _alike(model, names, count, ready):
            for start in range(0, len(rows), batch_size):
                chunk = rows[start : start + batch_size]
                tasks = None if names is None else [names[row] for row in chunk]
                found = _predicted(model, _taken(raw, chunk, ready), tasks, ready, top, threshold)
                for row, prediction in zip(chunk, found, strict=True):
                    results[row] = prediction
    return [prediction for prediction in results if prediction is not None]


def _names(model: nn.Module, task: Any, count: int) -> list[str] | None:
    """The task of each input; None for the decider's choice."""
    registry = registry_of(model)
    if task is None:
        task = registry.current()
    if task == AUTO:
        return None
    names = [task] * count if isinstance(task, str) or task is None else list(task)
    if len(names) != count:
        raise VisadaptError(f"task must name one task per input, got {len(names)} for {count} inputs")
    return [registry.task(name).name for name in names]


def _decided(model: nn.Module) -> tuple[str, ...]:
    decider = registry_of(model).decider
    if decider is None:
        raise VisadaptError("task='auto' needs a decider: visadapt.fit_decider makes one, load_decider reads one")
    known: tuple[str, ...] = decider.tasks
    return known


def _alike(model: nn.Module, names: list[str] | None, count: int, ready: bool) -> list[list[int]]:
    """Rows that can share a batch: all of them, unless their tasks prepare inputs in different ways."""
    if ready or names is None or same_inputs(model, names) is not None:
        return [list(range(count))]
    groups: dict[Any, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(preprocess(model, name).inputs, []).append(row)
    return list(groups.values())


@reading("inputs")
def _length(raw: Any) -> int:
    first = next(iter(raw.values()), ()) if isinstance(raw, Mapping) else raw
    if isinstance(first, Tensor) and (first.ndim == 0 or first.dtype == torch.uint8):
        raise VisadaptError(
            "a tensor of inputs must be a float batch as the model takes it, got "
            f"{first.dtype} of shape {tuple(first.shape)}"
        )
    if isinstance(raw, Mapping) and not all(isinstance(value, Tensor) for value in raw.values()):
        got = ", ".join(f"{shown(key, 40)}: {type(value).__name__}" for key, value in raw.items())
        raise VisadaptError(f"inputs must map the model's arguments to tensors, got {got}")
    if not len(first):
        raise VisadaptError("inputs must have at least one image or text, got none")
    return len(first)


def _taken(raw: Any, rows: list[int], ready: bool) -> Any:
    if not ready:
        return [raw[row] for row in rows]
    if isinstance(raw, Mapping):
        return {key: value[rows] for key, value in raw.items()}
    return raw[rows]


def _predicted(
    model: nn.Module, raw: Any, names: list[str] | None, ready: bool, top: int | None, threshold: float
) -> list[Prediction]:
    """Predict one batch, whose inputs are all prepared alike."""
    known = _decided(model) if names is None else names
    prepared = raw if ready else preprocess(model, known[0])(raw)
    with input_errors("inputs"):
        batch = _moved(prepared, model)
    chosen = decide(model, batch) if names is None else names
    single = len(set(chosen)) == 1
    with using(model, chosen[0] if single else chosen), input_errors("inputs"):
        logits = logits_of(model, batch)
    registry = registry_of(model)
    parts = {chosen[0]: logits} if single else split(model, logits, chosen)
    answers = {name: iter(read_logits(registry.task(name), part, top, threshold)) for name, part in parts.items()}
    return [next(answers[name]) for name in chosen]


def _moved(batch: Any, model: nn.Module) -> Any:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return {k: v.to(device) for k, v in batch.items()} if isinstance(batch, Mapping) else batch.to(device)


def logits_of(model: nn.Module, batch: Any) -> Tensor:
    """Run a model on a batch; return its logits, ``(N, C)``.

    Raises:
        VisadaptError: the model's output is something else.
    """
    out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    logits = getattr(out, "logits", out)
    if isinstance(logits, tuple):
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise VisadaptError(f"logits of {type(model).__name__} must have shape (N, classes), got {got}")
    return logits


def read_logits(task: Task, logits: Tensor, top: int | None = None, threshold: float = 0.5) -> list[Prediction]:
    """Turn a task's logits into predictions.

    Args:
        task: the task; its labels name the outputs, its note ``problem_type`` says what they are.
        logits: ``(N, C)``.
        top: as `predict` takes it.
        threshold: as `predict` takes it.

    Raises:
        VisadaptError: a logit is NaN or infinite, the task has another number of labels, or its note is unknown.
    """
    return read_outputs(task.name, task.labels, problem_of(task), logits, top, threshold)


def read_outputs(
    name: str, labels: tuple[str, ...] | None, problem: str, logits: Tensor, top: int | None, threshold: float = 0.5
) -> list[Prediction]:
    """Turn logits into predictions.

    Args:
        name: of the task.
        labels: names of the outputs; None for their numbers.
        problem: one of ``PROBLEMS``.
        logits: ``(N, C)``.
        top: as `predict` takes it.
        threshold: as `predict` takes it.

    Raises:
        VisadaptError: a logit is NaN or infinite, or there is another number of labels.
    """
    logits = logits.detach().float().cpu()
    width = logits.shape[1]
    labels = tuple(map(str, range(width))) if labels is None else labels
    if len(labels) != width:
        raise VisadaptError(f"task {name!r} has {len(labels)} labels for {width} outputs")
    # −inf is allowed: a network may rule out a class
    bad = int((logits.isnan() | (logits == torch.inf)).any(-1).sum())
    if bad:
        raise VisadaptError(f"task {name!r} gives NaN or infinite logits for {bad} of {len(logits)} inputs")
    if problem == "regression":
        return [Prediction(name, labels, values=tuple(row)) for row in logits.tolist()]
    several = problem == "multi_label_classification"
    probabilities = logits.sigmoid() if several else logits.softmax(-1)
    best = probabilities.topk(width if top is None and several else min(top or 1, width))
    found = []
    for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        kept = [(labels[i], p) for p, i in zip(values, indices, strict=True) if p >= threshold or not several or top]
        found.append(Prediction(name, tuple(label for label, _ in kept), tuple(p for _, p in kept)))
    return found


def problem_of(task: Task) -> str:
    """What a task's outputs are, as its note ``problem_type`` says.

    Raises:
        VisadaptError: the note is not one of ``PROBLEMS``.
    """
    return problem_noted(task.name, task.notes)


def problem_noted(name: str, notes: Mapping[str, Any]) -> str:
    """What the outputs of a task with such notes are; see `problem_of`."""
    problem = notes.get("problem_type", PROBLEMS[0])
    if problem not in PROBLEMS:
        raise VisadaptError(f"task {name!r}: problem_type must be one of {', '.join(PROBLEMS)}, got {problem!r:.100}")
    return str(problem)


_EVALUATING: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
_LOCK = threading.Lock()


@contextmanager
def evaluating(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Put the backbone and the parts of some tasks into eval mode for a block.

    Where several threads are in such blocks, the last to leave restores the modules that were in train mode.
    """
    backbone, registry = unwrapped(model), registry_of(model)
    parts = [part for name in names for own in registry.parts(name).values() for part in own.modules()]
    with _LOCK:
        inside, changed = _EVALUATING.get(backbone, (0, []))
        for module in (*own_modules(backbone).values(), *parts):
            if module.training:
                module.training = False
                changed.append(module)
        _EVALUATING[backbone] = inside + 1, changed
    try:
        yield
    finally:
        with _LOCK:
            inside, changed = _EVALUATING.pop(backbone)
            if inside > 1:
                _EVALUATING[backbone] = inside - 1, changed
            else:
                for module in changed:
                    module.training = True
