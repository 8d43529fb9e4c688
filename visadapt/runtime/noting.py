"""Hooks that replace what they are shown are noted while a mixed batch runs; see `visadapt.backbone.added`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from visadapt.backbone.added import HOOKS, function_of, replaces
from visadapt.backbone.batch import leaves
from visadapt.backbone.modules import OURS
from visadapt.errors import VisadaptError

_HEARD: ContextVar[list[Any] | None] = ContextVar("visadapt_heard", default=None)


class _Noting:
    """Stands in the place of a hook while a batch runs, and notes whether it replaces anything."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.hook(*args, **kwargs)
        heard = _HEARD.get()
        if out is not None and heard is not None:
            shown = {id(leaf) for _, leaf in leaves(args[1:])}
            if any(isinstance(leaf, Tensor) and id(leaf) not in shown for _, leaf in leaves(out)):
                heard.append(self.hook)
        return out

    def __reduce__(self) -> Any:
        # a copy of the model that is made meanwhile has the hook itself
        return _itself, (self.hook,)


def _itself(hook: Any) -> Any:
    return hook


class Noted:
    """The hooks of one model while batches run, of which several may run at once in several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._placed: list[tuple[dict[int, Any], int, _Noting]] = []

    def __reduce__(self) -> Any:
        return Noted, ()

    @contextmanager
    def within(self, modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
        """Note the hooks of some modules that replace anything within, beside those that are known to.

        Args:
            modules: those of the backbone that have hooks.

        Returns:
            A list of them, which is complete at the end.
        """
        with self._lock:
            self._running += 1
            for module in modules:
                for hooks in (module.__dict__[name] for name in HOOKS):
                    for key, hook in list(hooks.items()):
                        if not (isinstance(hook, _Noting) or _moves_nothing(hook) or replaces(hook)):
                            hooks[key] = _Noting(hook)
                            self._placed.append((hooks, key, hooks[key]))
        heard: list[Any] = []
        token = _HEARD.set(heard)
        try:
            yield heard
        finally:
            _HEARD.reset(token)
            with self._lock:
                self._running -= 1
                if not self._running:
                    for hooks, key, placed in self._placed:
                        if hooks.get(key) is placed:
                            hooks[key] = placed.hook
                    self._placed = []


def _moves_nothing(hook: Any) -> bool:
    """Whether a hook is of visadapt, or of torch: those of FSDP replace tensors by others with the same rows."""
    return OURS in getattr(hook, "__dict__", ()) or str(function_of(hook).__module__).startswith("torch.")


def unsettled(hook: Any) -> VisadaptError:
    """Return the error for a training step in which a hook changed which rows belong to which sample."""
    name = getattr(hook, "__qualname__", type(hook).__qualname__)
    return VisadaptError(
        f"the hook {name} moves the rows of samples, which is known only since this batch: call it again, and each "
        "sample gets its own task"
    )
