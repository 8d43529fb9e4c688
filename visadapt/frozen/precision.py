"""Notes in tasks that were trained on a backbone whose weights were codes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from visadapt.frozen.checksums import Checksums
from visadapt.runtime.registry import Registry, named_tensors

NOTE = "trained on backbone weights"
"""Key of the note; its value is how the weights were kept, such as ``int8``."""


def begin(registry: Registry, tasks: Iterable[str]) -> None:
    """Record checksums of the tasks that are, or come, in a model whose weights are codes."""
    if registry.lean is not None and registry.lean.weights is not None:
        for name in tasks:
            registry.lean.begun[name] = _held(registry, name)


def precision_notes(registry: Registry, task: str) -> dict[str, Any]:
    """The note of a task whose tensors changed while the backbone's weights were codes; empty for another."""
    if registry.lean is None or registry.lean.weights is None:
        return {}
    return {} if registry.lean.begun.get(task) == _held(registry, task) else {NOTE: registry.lean.weights}


def note_precision(registry: Registry) -> None:
    """Write these notes into the tasks, before the backbone gets its own weights back."""
    for name, task in registry.tasks.items():
        task.notes |= precision_notes(registry, name)


def _held(registry: Registry, task: str) -> Checksums:
    return Checksums(list(named_tensors(registry, task).values()))
