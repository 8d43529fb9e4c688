"""One batch of mixed tasks: its tasks brought into memory, its samples put together, one forward, one answer each."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from visadapt.opening.predicting import logits_of
from visadapt.runtime.choice import AUTO
from visadapt.runtime.decider import Decider, features
from visadapt.runtime.logits import split
from visadapt.runtime.selection import using
from visadapt.serving.catalogue import Entry
from visadapt.serving.limits import Limits
from visadapt.serving.metrics import Metrics
from visadapt.serving.pool import Pool
from visadapt.serving.preparing import example, prepare, sides
from visadapt.serving.refusal import ServingError
from visadapt.serving.waiting import Item

log = logging.getLogger(__name__)


class Forward:
    """Answers batches of items; called by the worker thread only.

    Args:
        pool: the tasks and their model.
        metrics: counts batches; None to count nothing.
        device: of the model.
        limits: upper bounds of images.
        exact: whether every sample runs alone, so that its answer does not depend on what else is in the batch.
        decider: chooses the task of items named ``"auto"``; None if there is none.
    """

    def __init__(
        self,
        pool: Pool,
        metrics: Metrics | None,
        device: torch.device,
        limits: Limits,
        exact: bool = False,
        decider: Decider | None = None,
    ) -> None:
        self.pool, self.exact, self.decider = pool, exact, decider
        self._metrics, self._device, self._limits = metrics, device, limits

    def uncounted(self) -> Forward:
        """The same, without metrics."""
        return Forward(self.pool, None, self._device, self._limits, self.exact, self.decider)

    def known(self, task: str) -> str:
        """Return the task whose inputs are a request's: for ``"auto"``, the first of the decider's that there is.

        Raises:
            ServingError: the decider is asked for, and there is none.
        """
        if task != AUTO:
            return task
        if self.decider is None:
            raise ServingError("invalid_request", "task 'auto' needs a decider, and this server has none",
                               "name a task, or start the server with a decider")  # fmt: skip
        return next(filter(self._there, self.decider.tasks), self.decider.tasks[0])

    def _there(self, name: str) -> bool:
        try:
            return bool(self.pool.entry(name))
        except ServingError:
            return False

    def answer(self, items: Sequence[Item]) -> None:
        """Give every item its answer or its error."""
        waiting = [item for item in items if item.future.set_running_or_notify_cancel()]
        if self._metrics is not None:
            for item in waiting:
                self._metrics.wait.observe(time.monotonic() - item.since)
        undecided = [item for item in waiting if item.task == AUTO]
        for group in [[item] for item in undecided] if self.exact else filter(None, [undecided]):
            self._decide(group)
        ready = [item for item in waiting if not item.future.done()]
        for part in _parts(ready, self.pool.most):
            self._ensure(part)
            batches: dict[Any, list[Item]] = {}
            for item in part:
                if item.entry is not None and not item.future.done():
                    # of exact batches, each is a group of its own
                    batches.setdefault(id(item) if self.exact else item.entry.inputs.form, []).append(item)
            for batch in batches.values():
                self._run(batch)

    def _ensure(self, items: Sequence[Item]) -> None:
        """Bring the tasks of some items into memory, and prepare the samples whose task was replaced meanwhile."""
        names = {item.task for item in items}
        for name in sorted(names):
            own = [item for item in items if item.task == name]
            try:
                entry = self.pool.ensure(name, names)
            except ServingError as error:
                for item in own:
                    item.fail(error)
                continue
            for item in own:
                self._fit(item, entry)

    def _prepare(self, item: Item, entry: Entry) -> None:
        """Prepare an item for this version of its task, unless it is prepared in the same way already."""
        if item.entry is None or item.entry.inputs != entry.inputs:
            item.prepared = prepare(entry, item.sample, self._limits)
        item.entry = entry

    def _fit(self, item: Item, entry: Entry) -> None:
        try:
            self._prepare(item, entry)
        except ServingError as error:
            item.fail(error)

    def _run(self, batch: list[Item]) -> None:
        """Run one forward; where it fails, every item alone, so that one sample does not harm the others."""
        try:
            for item, logits in zip(batch, self._logits(batch), strict=True):
                self._settle(item, logits)
        except Exception as error:  # whatever a kernel may raise
            if len(batch) > 1:
                for item in batch:
                    if not item.future.done():
                        self._run([item])
                return
            message = f"the model failed on this input: {type(error).__name__}: {error}"
            batch[0].fail(ServingError("failed", message, "check the input and the task"))

    def _settle(self, item: Item, logits: Tensor) -> None:
        # −inf is allowed: a network may rule out a class
        if not bool((logits < math.inf).all()):
            message = f"task {item.task!r} gives NaN or infinite logits for this input"
            item.fail(ServingError("failed", message, "check the input, or train the task again"))
            return
        if self._metrics is not None:
            # first, so that whoever has the answer finds it counted
            self._metrics.latency.labels(item.task).observe(time.monotonic() - item.since)
        item.future.set_result((item.entry, logits))

    def _logits(self, batch: Sequence[Item]) -> list[Tensor]:
        entries = [item.entry for item in batch if item.entry is not None]
        inputs = _moved(entries[0].inputs.collate([item.prepared for item in batch]), self._device)
        names = [entry.name for entry in entries]
        single = len(set(names)) == 1
        if self._metrics is not None:
            self._metrics.batch.observe(len(batch))
            self._metrics.tasks.observe(len(set(names)))
        with torch.no_grad(), using(self.pool.model, names[0] if single else names):
            logits = logits_of(self.pool.model, inputs)
        if single:
            return list(logits.float().cpu())
        parts = {name: iter(rows) for name, rows in split(self.pool.model, logits.float().cpu(), names).items()}
        return [next(parts[name]) for name in names]

    def _decide(self, items: list[Item]) -> None:
        """Let the decider choose the task of each item, by the bare backbone's features of its input."""
        assert self.decider is not None  # or else `known` refused the request
        try:
            # prepared as a task's inputs are that there is; the chosen task's own way follows
            entry = self.pool.entry(self.known(AUTO))
            for item in items:
                self._prepare(item, entry)
            batch = entry.inputs.collate([item.prepared for item in items])
            with torch.no_grad():
                chosen = self.decider(features(self.pool.model, _moved(batch, self._device))).argmax(1).tolist()
        except Exception as error:  # whatever a kernel may raise
            if len(items) > 1:
                for item in items:
                    self._decide([item])
                return
            known = isinstance(error, ServingError)
            items[0].fail(error if known else ServingError("failed", f"the decider failed: {error}", "name a task"))
            return
        for item, index in zip(items, chosen, strict=True):
            item.task = self.decider.tasks[index]


def warm_up(forward: Forward, count: int, max_batch: int) -> int:
    """Run batches of meaningless samples, so that no request has to establish which rows of a batch are whose.

    That is established once for each number of samples and each size of a sample (see
    `visadapt.backbone.known_batches`): here for the smallest and the largest batches, for lengths other than 1, and for
    a batch that by chance has as many samples as the input has channels, pixels or tokens. The first request of any
    other size establishes it, which takes about as long as its own forward.

    Args:
        forward: of the server.
        count: tasks per batch, at most.
        max_batch: samples per batch, at most.

    Returns:
        The number of tasks that answered.
    """
    forward = forward.uncounted()  # these samples are not requests
    forms: dict[Any, list[Entry]] = {}
    for _, state in forward.pool.entries():
        if isinstance(state, Entry):
            forms.setdefault(state.inputs.form, []).append(state)
    answered = set()
    for form, every in forms.items():
        entries = list(islice(filter(_usable, every), count))
        if not entries:
            continue
        most = 1 if forward.exact else max_batch
        for length in (4, 7) if form[0] == "texts" else (1,):
            sizes = {1, 2, 4, most - 1, most, *sides(entries[0], length)}
            for size in sorted(size for size in sizes if 1 <= size <= most):
                chosen = [entries[i % len(entries)] for i in range(size)]
                batch = [Item(entry.name, example(entry, i, length)) for i, entry in enumerate(chosen)]
                forward.answer(batch)
                answered |= {item.task for item in batch if item.future.exception() is None}
    return len(answered)


def _usable(entry: Entry) -> bool:
    """Whether inputs can be prepared for a task: its tokenizer may be missing, for instance."""
    try:
        prepare(entry, example(entry, 0), Limits())
    except ServingError as error:
        log.warning("task %s cannot be warmed up: %s", entry.name, error)
        return False
    return True


def _parts(items: Sequence[Item], most: int) -> list[list[Item]]:
    """Divide items so that no part has more tasks than may be in memory."""
    parts: list[list[Item]] = []
    names: set[str] = set()
    for item in items:
        if not parts or len(names | {item.task}) > most:
            parts.append([])
            names = set()
        names.add(item.task)
        parts[-1].append(item)
    return parts


def _moved(batch: Any, device: torch.device) -> Any:
    return {key: value.to(device) for key, value in batch.items()} if isinstance(batch, dict) else batch.to(device)
