"""Tasks without values: tensors made on the meta device have none, also after ``to_empty``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from visadapt.errors import VisadaptError


class Unfilled:
    """The tasks that may have tensors without values, and which tensors those are.

    A tensor of ``to_empty`` has values once something was written into it, as its version shows, or once it was
    replaced.
    """

    def __init__(self) -> None:
        # task → tensors as they were when memory was given to them, with their versions
        self._tasks: dict[str, list[tuple[Tensor, int]]] = {}

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def __getstate__(self) -> dict[str, list[Tensor]]:
        return {task: [tensor for tensor, _ in _empty(given)] for task, given in self._tasks.items()}

    def __setstate__(self, state: dict[str, list[Tensor]]) -> None:
        self._tasks = {task: [(tensor, _version(tensor)) for tensor in given] for task, given in state.items()}

    def note(self, task: str, tensors: Iterable[Tensor]) -> None:
        """Record a task if one of its tensors is on the meta device."""
        if any(tensor.is_meta for tensor in tensors):
            self._tasks.setdefault(task, [])

    def moved(self, task: str, before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
        """Record which of a task's tensors were on the meta device before they were moved."""
        given = [now[name] for name, old in before.items() if old.is_meta and name in now and not now[name].is_meta]
        if given:
            self._tasks.setdefault(task, []).extend((tensor, _version(tensor)) for tensor in given)
        self.note(task, now.values())

    def check(self, tasks: Iterable[Any], tensors: Callable[[str], Mapping[str, Tensor]], on_meta: bool) -> None:
        """Refuse tasks without values.

        Args:
            tasks: their names.
            tensors: gives a task's tensors by name.
            on_meta: whether the backbone is on the meta device too, where a forward only tells shapes.

        Raises:
            VisadaptError: a task has a tensor without values; it is named with the remedy.
        """
        for task in [task for task in dict.fromkeys(tasks) if task in self._tasks]:
            own = tensors(task)
            empty = {id(tensor) for tensor, _ in _empty(self._tasks[task])}
            names = [name for name, tensor in own.items() if tensor.is_meta or id(tensor) in empty]
            if not names:
                del self._tasks[task]
            elif not on_meta:
                raise VisadaptError(
                    f"task {task!r} was made on the meta device and {names[0]} has no values yet: load a state dict "
                    "that has the task, or load the backbone's weights first and then inject or visadapt.load the task"
                )


def _empty(given: list[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
    return [(tensor, version) for tensor, version in given if _version(tensor) == version]


def _version(tensor: Tensor) -> int:
    # tensors made in inference mode count no changes
    return -1 if tensor.is_inference() else tensor._version
