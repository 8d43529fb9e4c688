"""The modules of many tasks at one host; torch's walks of the model visit only those in use.

``model.train()``, ``zero_grad()``, ``parameters()``, ``modules()`` and ``requires_grad_()`` visit every module below a
model. A model may have thousands of tasks, so the tree of modules contains the tasks in use only (see
`visadapt.runtime.in_use`). Operations on the tensors themselves reach all tasks: ``to()``, ``state_dict()``,
``load_state_dict()``, ``copy.deepcopy`` and pickle.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.modules import joined
from visadapt.runtime.choice import Choices
from visadapt.runtime.quick_walks import changes_nothing, copied, copied_into, save_state, set_modes

_LOADING = "_loading"
_LAST_READ = "_last_read"


class TaskModules(nn.Module):
    """Modules by task and name.

    A mode or gradient flag that is set for all tasks reaches a task when it is next used.
    """

    _registry: Choices

    def __init__(self) -> None:
        super().__init__()
        # numbers of the mode, and of which gradients flow, that were set for all tasks, and those that each task has
        self._modes = 0
        self._last_mode = 0
        self._flows = 0
        self._flowing: frozenset[str] = frozenset()
        self._followed: dict[str, tuple[int, int]] = {}

    def _listed(self) -> Any:
        """The children that torch sees."""
        own = self._all
        registry: Choices | None = self.__dict__.get("_registry")
        if registry is None or "_is_replica" in self.__dict__ or torch.compiler.is_dynamo_compiling():
            return own
        loading = self.__dict__.get(_LOADING)
        if loading is not None and loading[0] == threading.get_ident():
            if self.__dict__.pop(_LAST_READ, False):
                del self.__dict__[_LOADING]
            return {name: own[name] for name in loading[1] if name in own}
        return {name: self._of(name) for name in registry.listed() if name in own}

    def _replace(self, value: Any) -> None:
        # one dict under two names: torch's own, and one that is not a property, as some versions of the compiler follow
        # the property without end where its own code reads the first
        self.__dict__["_modules"] = self.__dict__["_all"] = value

    _modules = property(_listed, _replace)

    _all: dict[str, nn.ModuleDict]

    def _of(self, task: str) -> nn.ModuleDict | None:
        """A task's modules by name, or None; they are in the mode that was set last."""
        own = self._all.get(task)
        if own is not None and not torch.compiler.is_dynamo_compiling():
            now = (self._modes, self._flows)
            if self._followed.get(task) != now:
                self._follow(task, own, now)
        return own

    def _follow(self, task: str, own: nn.ModuleDict, now: tuple[int, int]) -> None:
        modes, flows = self._followed.get(task, (-1, -1))
        if modes != now[0]:
            set_modes(own, self.training)
        if flows != now[1]:
            own.requires_grad_(task in self._flowing)
        self._followed[task] = now

    def _put(self, task: str, training: bool) -> nn.ModuleDict:
        """A task's modules; with none yet, in this mode, if it is new."""
        if task not in self._all:
            self._followed[task] = (self._modes, self._flows)
            self._all[task] = nn.ModuleDict().train(training)
        own = self._of(task)
        assert own is not None
        return own

    def _drop(self, task: str) -> None:
        """Forget a task's modules."""
        del self._all[task]
        self._followed.pop(task, None)

    def _let_flow(self, tasks: frozenset[str]) -> None:
        """Let gradients flow to these tasks only."""
        self._flowing = tasks
        self._flows += 1
        self._registry.changes += 1

    def __contains__(self, task: object) -> bool:
        return task in self._all

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._all))

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, task: str) -> nn.ModuleDict:
        own = self._of(task)
        if own is None:
            raise KeyError(task)
        return own

    def train(self, mode: bool = True) -> Any:
        """Set the mode of all tasks: now if they are chosen, else when they are next used."""
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")
        # not by setattr, which takes half of the time
        own = self.__dict__
        own["training"] = mode
        # no number is given twice: `_as_set` goes back to an older one
        own["_last_mode"] += 1
        own["_modes"] = own["_last_mode"]
        registry: Choices | None = own.get("_registry")
        if registry is not None:
            registry.changes += 1
            for task in registry.chosen():
                self._of(task)
        return self

    def _modes_set(self) -> tuple[int, Collection[str]]:
        """The number of the mode that was set last for all tasks, and the tasks in use, which have it."""
        return self._modes, list(self._modules)

    def _as_set(self, before: tuple[int, Collection[str]]) -> None:
        """Restore the mode that was set last for all tasks.

        A task that is not in use has not followed meanwhile, and keeps the modes that its modules have.

        Args:
            before: what `_modes_set` returned; the modules of its tasks are in their modes of then again.
        """
        self._modes, tasks = before
        for task in tasks:
            if task in self._followed:
                self._followed[task] = self._modes, self._followed[task][1]
        self._registry.changes += 1

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Write the tensors of all tasks into a state dict; see ``nn.Module.state_dict``."""
        if destination is None:
            destination = nn.Module().state_dict(*args)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]] = {"version": self._version}
        for task, own in list(self._all.items()):
            save_state(own, destination, f"{prefix}{task}.", keep_vars)
        return destination

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for task, own in list(self._all.items()) if recurse else ():
            if not changes_nothing(own, fn):
                before = dict(_held(own))
                own._apply(fn)  # type: ignore[no-untyped-call]
                self._moved(task, before, dict(_held(own)))
        return self

    def _moved(self, task: str, before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
        """Note that a task's tensors were moved.

        Args:
            task: its name.
            before: the tensors as they were.
            now: what stands in their place.
        """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # a checkpoint that says nothing of a task leaves that task as it is: vanilla checkpoints still load, strictly
        tasks = dict.fromkeys(key[len(prefix) :].partition(".")[0] for key in state_dict if key.startswith(prefix))
        self.__dict__[_LOADING] = threading.get_ident(), tasks
        super()._load_from_state_dict(state_dict, prefix, *args)
        # the caller reads the children to load once more
        self.__dict__[_LAST_READ] = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        only = _COPYING_ONLY.get()
        # both are written by other threads meanwhile
        own, followed = dict(self._all), dict(self._followed)
        if only is not None:
            own = {only: own[only]} if only in own else {}
            followed = {only: followed[only]} if only in followed else {}
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        memo[id(self._followed)] = followed
        memo[id(self._all)] = copies = {}
        copied_into(twin, self, memo)
        copies.update({name: copied(each, memo) for name, each in own.items()})
        return twin


def _held(modules: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a state dict has of a task's modules, by name."""
    for path, module in modules.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield joined(path, name), tensor


_COPYING_ONLY: ContextVar[str | None] = ContextVar("visadapt_copying_only", default=None)


@contextmanager
def copying_only(task: str) -> Iterator[None]:
    """Let copies of a model that are made in this block have a single task."""
    token = _COPYING_ONLY.set(task)
    try:
        yield
    finally:
        _COPYING_ONLY.reset(token)
