"""The tasks in memory: loaded on first request, the least recently used ones removed when there are too many.

Only the worker thread changes a pool, between batches, so that no forward ever sees half a task.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

from torch import nn

from visadapt.errors import VisadaptError
from visadapt.injection import remove
from visadapt.runtime.registry import find_registry, registry_of
from visadapt.serving.catalogue import Catalogue, Entry, without_folder
from visadapt.serving.metrics import Metrics
from visadapt.serving.refusal import ServingError
from visadapt.task_file import load


class Pool(Protocol):
    """Where a server has its tasks from."""

    model: nn.Module
    most: int

    def names(self) -> list[str]:
        """Return the names of all tasks."""

    def entry(self, name: str) -> Entry:
        """Return the present version of a task, or raise a ServingError."""

    def entries(self) -> Iterator[tuple[str, Entry | ServingError]]:
        """Iterate over all tasks with what is known of them."""

    def ensure(self, name: str, keep: set[str]) -> Entry:
        """Bring the present version of a task into memory, and return it; leave the tasks of `keep` there."""

    def loaded(self) -> frozenset[str]:
        """Return the names of the tasks in memory."""

    def recover(self) -> None:
        """Bring the model into a known state after a crash."""


class FilePool:
    """The tasks of a catalogue of files.

    Args:
        model: the backbone, without tasks.
        catalogue: the files.
        most: tasks in memory at the same time.
        metrics: counts loads and evictions.
    """

    def __init__(self, model: nn.Module, catalogue: Catalogue, most: int, metrics: Metrics) -> None:
        self.model, self.most = model, most
        self._catalogue, self._metrics = catalogue, metrics
        self._loaded: OrderedDict[str, str] = OrderedDict()
        self.names, self.entry, self.entries = catalogue.names, catalogue.entry, catalogue.entries

    def ensure(self, name: str, keep: set[str]) -> Entry:
        """Bring the present version of a task into memory.

        Args:
            name: of the task.
            keep: tasks of the same batch, which are not removed to make room.

        Raises:
            ServingError: the task does not exist, or its file cannot be used with this backbone.
        """
        try:
            for _ in range(100):
                entry = self._catalogue.entry(name)
                if self._loaded.get(name) == entry.digest:
                    self._loaded.move_to_end(name)
                    return entry
                self._remove(name)
                self._make_room(keep)
                if self._load(entry) == entry.digest:
                    return entry
                # the file was replaced before it was loaded: whatever it is now, other weights are in memory
                self._remove(name)
            raise ServingError("broken_task", f"the file of task {name!r} changes while it is read", "rename it")
        except ServingError:
            self._remove(name)
            raise

    def _load(self, entry: Entry) -> str:
        """Load a task; return the digest of what was loaded."""
        assert entry.path is not None
        try:
            load(self.model, entry.path, task=entry.name)
        except VisadaptError as error:
            if not entry.path.is_file():
                raise self._catalogue.unknown(entry.name) from error
            message = without_folder(error, entry.path)
            raise ServingError("broken_task", message, "replace the file") from error
        # files of earlier versions have no digest of their own: then that of the entry, if it is still the present one
        digest = registry_of(self.model).task(entry.name).digest
        if digest is None:
            digest = entry.digest if self._catalogue.entry(entry.name) == entry else ""
        self._loaded[entry.name] = digest
        self._metrics.loads.inc()
        self._metrics.loaded.set(len(self._loaded))
        return digest

    def _make_room(self, keep: set[str]) -> None:
        others = [name for name in self._loaded if name not in keep]
        for name in others:
            if isinstance(self._catalogue.state(name), ServingError):
                # its file was removed or broken since it was last asked for
                self._remove(name)
        while len(self._loaded) >= self.most:
            self._remove(next(name for name in self._loaded if name not in keep))
            self._metrics.evictions.inc()

    def _remove(self, name: str) -> None:
        registry = find_registry(self.model)
        if registry is not None and name in registry.tasks:
            remove(self.model, name)
        if self._loaded.pop(name, None) is not None:
            self._metrics.loaded.set(len(self._loaded))

    def loaded(self) -> frozenset[str]:
        """Return the names of the tasks in memory."""
        return frozenset(self._loaded.copy())

    def recover(self) -> None:
        """Remove all tasks: the next requests load them again."""
        registry = find_registry(self.model)
        for name in [*self._loaded, *(() if registry is None else registry.tasks)]:
            self._remove(name)
