"""Which tasks are in use, so that torch's walks of a model see their modules."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch.optim.swa_utils import AveragedModel

from visadapt.backbone.modules import REGISTRY
from visadapt.errors import VisadaptError
from visadapt.runtime.blocks import Block, frames


def is_averaging() -> bool:
    """Whether torch's AveragedModel copies a model here."""
    return any(frame.f_code is AveragedModel.__init__.__code__ for frame in frames())


def _these(names: Sequence[str]) -> str:
    return f"task{'s' * (len(names) > 1)} {', '.join(map(repr, names))}" if names else "no task"


class Listing(NamedTuple):
    """The tasks in use at one moment.

    Attributes:
        tasks: of the model, by name.
        key: what else the listing depends on.
        names: of those in use, in the order they came.
    """

    tasks: Any
    key: Any
    names: Sequence[str]


class TasksInUse:
    """The tasks that are chosen, and those that train or may be about to.

    A task whose parameters were requested is in use until another task is injected or chosen, and longer while it has
    gradients. One that ran with gradients enabled is in use until `visadapt.trainable` names others: a backward pass
    may come at any time. Where there are several processes, all tasks are in use: DDP and FSDP look for parameters
    once.

    Attributes:
        tasks: the model's tasks by name. The dict is replaced, never changed, when a task comes or goes.
        changes: how often a mode or gradient flag was set for all tasks; each task follows when it is next used.
    """

    tasks: dict[str, Any]

    def __init__(self) -> None:
        self.changes = 0
        # whether torch's AveragedModel made this copy
        self._averages = False
        # dicts for their order, replaced and never changed
        self._asked: dict[str, None] = {}
        self._trained: dict[str, None] = {}

    def _start(self) -> None:
        # per thread: what was chosen there, and what it last listed
        self._local = threading.local()

    def ask(self, task: str) -> None:
        """Note that the parameters of a task were requested."""
        self._asked = {**self._asked, task: None}

    def note_forward(self, taken: Iterable[tuple[str, Any]]) -> None:
        """Note the tasks of a forward if a backward pass may follow.

        Args:
            taken: their names, each with its task.
        """
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            new = {name: None for name, _ in taken if name not in self._trained}
            if new:
                self._trained = {**self._trained, **new}

    def settle(self) -> None:
        """Forget the tasks whose parameters were requested and have no gradients."""
        if self._asked:
            self._asked = dict.fromkeys(filter(self.has_gradients, self._asked))

    def train_only(self, tasks: Iterable[str]) -> None:
        """Forget the tasks that trained, except these and those with gradients."""
        self._asked = dict.fromkeys((*filter(self.has_gradients, {**self._asked, **self._trained}), *tasks))
        self._trained = {}

    def forget(self, task: str) -> None:
        """Forget a task that was removed."""
        asked, trained = ({k: None for k in names if k != task} for names in (self._asked, self._trained))
        self._asked, self._trained = asked, trained

    def chosen(self) -> dict[str, None]:
        """The tasks that are chosen, by ``activate`` or in a block of any thread; some may have been removed since."""
        return {name: None for block in self.blocks() if block is not None for name, _ in block.taken}

    def listed(self) -> Sequence[str]:
        """The tasks whose modules torch's walks of the model see, in the order they came."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        tasks = self.tasks
        key = (*self.choices(), self._asked, self._trained, several)
        last: Listing | None = getattr(self._local, "listing", None)
        # every host asks in turn
        if last is None or last.tasks is not tasks or last.key != key:
            names: Iterable[str] = tasks if several else {**self.chosen(), **self._asked, **self._trained}
            own = sorted((name for name in names if name in tasks), key=lambda name: tasks[name].number)
            last = self._local.listing = Listing(tasks, key, own)
        if self._averages:
            self._check_averaged(last.names)
        return last.names

    def _check_averaged(self, names: Sequence[str]) -> None:
        """Refuse to average the parameters of other tasks: torch pairs those of two models by their order alone.

        Raises:
            VisadaptError: the model that is averaged has other tasks in use.
        """
        frame = next((f for f in frames() if f.f_code is AveragedModel.update_parameters.__code__), None)
        if frame is None:
            return
        registries = (module.__dict__.get(REGISTRY) for module in frame.f_locals["model"].modules())
        registry = next((each for each in registries if each is not None), None)
        others = () if registry is None else registry.listed()
        if list(others) != list(names):
            raise VisadaptError(
                f"this AveragedModel averages {_these(names)}, and the model now uses {_these(others)}: make an "
                "AveragedModel per task, when visadapt.trainable(model, task) was called for it"
            )

    def blocks(self) -> tuple[Block | None, ...]:
        """The choices of tasks, of all threads."""
        raise NotImplementedError

    def choices(self) -> tuple[Any, ...]:
        """What changes whenever `blocks` does; it keeps no frame of a generator alive."""
        raise NotImplementedError

    def has_gradients(self, task: str) -> bool:
        """Whether any parameter of a task has a gradient; the task may have been removed."""
        raise NotImplementedError

    def follow(self, block: Block) -> None:
        """Apply to the chosen tasks what was set for all tasks."""
        raise NotImplementedError
