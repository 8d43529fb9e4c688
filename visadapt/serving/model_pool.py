"""The tasks of a model in memory, as a server sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from visadapt.data.inputs import Inputs
from visadapt.errors import nearest
from visadapt.opening.predicting import problem_of
from visadapt.runtime.registry import Task, named_tensors, registry_of, tasks
from visadapt.serving.catalogue import Entry
from visadapt.serving.refusal import ServingError
from visadapt.task_file import KIND
from visadapt.tensor_file import digest_of


class ModelPool:
    """Tasks that a model has already; none is loaded or removed.

    Args:
        model: an injected model.
        inputs: returns the inputs of a task.

    Raises:
        VisadaptError: the model has no tasks, or it is not known how their inputs are prepared.
    """

    def __init__(self, model: nn.Module, inputs: Callable[[str], Inputs]) -> None:
        self.model = model
        registry = registry_of(model)
        self._entries = {
            name: _entry(spec, named_tensors(registry, name), inputs(name)) for name, spec in tasks(model).items()
        }
        self.most = len(self._entries)

    def names(self) -> list[str]:
        """Return the names of all tasks."""
        return sorted(self._entries)

    def entry(self, name: str) -> Entry:
        """Return what is known of a task.

        Raises:
            ServingError: there is no such task.
        """
        if name not in self._entries:
            hint = nearest(name, self._entries)
            raise ServingError("unknown_task", f"no task {name!r:.200}{hint}", "see GET /v1/tasks")
        return self._entries[name]

    def entries(self) -> Iterator[tuple[str, Entry | ServingError]]:
        """Iterate over all tasks."""
        yield from sorted(self._entries.items())

    def ensure(self, name: str, keep: set[str]) -> Entry:
        """Return the task, which is in memory."""
        return self.entry(name)

    def loaded(self) -> frozenset[str]:
        """Return the names of all tasks."""
        return frozenset(self._entries)

    def recover(self) -> None:
        """Do nothing: a forward changes nothing that a crash could leave half changed."""


def _entry(spec: Task, tensors: dict[str, Any], inputs: Inputs) -> Entry:
    return Entry(
        spec.name,
        digest_of(KIND, spec.name, tensors),
        spec.labels,
        spec.num_classes,
        " + ".join(str(placement.method) for placement in spec.placements) or "–",
        spec.norms,
        sum(tensor.numel() for tensor in tensors.values()),
        sum(tensor.nbytes for tensor in tensors.values()),
        inputs,
        problem=problem_of(spec),
    )
