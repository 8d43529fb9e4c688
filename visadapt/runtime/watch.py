"""Detect and undo changes of a frozen backbone's buffers, forward by forward."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visadapt.backbone.modules import ancestors, own_modules
from visadapt.backbone.subclass import founded, made_by
from visadapt.errors import VisadaptError
from visadapt.runtime.classes import frozen_class, still_class
from visadapt.runtime.written import Written

COMPARED = 2
"""How many forwards in train mode compare the values of buffers: ``.data.mul_(…)`` leaves no other trace."""


@dataclass
class Kept:
    """A buffer of the backbone, with the values that it has to keep.

    Attributes:
        module: the module that has it.
        name: of the buffer.
        tensor: the buffer itself.
        state: torch's count of its changes in place, and its address.
        values: a copy.
    """

    module: nn.Module
    name: str
    tensor: Tensor | None = None
    state: tuple[int, int] | None = None
    values: Tensor | None = None

    def holds(self, exact: bool = False) -> bool:
        """Whether the buffer is as it was kept.

        Args:
            exact: compare its values as well.
        """
        now = self.module._buffers.get(self.name)
        return now is self.tensor and _state(now) == self.state and not (exact and _differ(now, self.values))

    @torch.no_grad()
    def keep(self) -> None:
        """Keep the buffer as it is now."""
        self.tensor = self.module._buffers.get(self.name)
        self.state = _state(self.tensor)
        self.values = None if self.tensor is None else self.tensor.detach().clone()

    def put_back(self) -> None:
        """Restore the buffer as it was kept.

        One that was changed in place is replaced: an autograd graph may need the changed one.
        """
        same = _state(self.tensor) == self.state and not _differ(self.tensor, self.values)
        self.module._buffers[self.name] = self.tensor if same else self.values
        self.keep()


def _state(tensor: Tensor | None) -> tuple[int, int] | None:
    # tensors made in inference mode count no changes
    if tensor is None or tensor.is_inference():
        return None
    try:
        return tensor._version, tensor.data_ptr()
    except RuntimeError:
        # a tensor without memory of its own, of torch.func or on a fake device
        return tensor._version, 0


def _differ(tensor: Tensor | None, values: Tensor | None) -> bool:
    if tensor is None or values is None or tensor.is_meta or tensor.shape != values.shape:
        return False
    try:
        floats = tensor.is_floating_point()
        return not (
            torch.equal(tensor, values) or (floats and torch.allclose(tensor, values, 0.0, 0.0, equal_nan=True))
        )
    except (RuntimeError, NotImplementedError):
        # values that cannot be compared, such as codes of quantised tensors
        return False


def _never_trains(module: nn.Module) -> bool:
    return not {frozen_class, still_class}.isdisjoint(made_by(type(module)))


class Watch:
    """Checks of the backbone before and after each forward of the whole model.

    Norms and other layers that are known to move in train mode never train (see
    `visadapt.runtime.classes.frozen_class`). Any other buffer may be moved by its module, or by one around it.
    """

    def __init__(self) -> None:
        self._start([])

    def _start(self, buffers: list[Kept]) -> None:
        self.buffers = buffers
        self.written = Written()
        self._compared = 0
        self._exact = False
        # the modules that have to stay, those that never train and hosts, and the modules around these, by path
        self._kept: dict[str, nn.Module] | None = None
        self._around: dict[str, nn.Module] = {}
        # where these are: children, name, module
        self._children: list[dict[str, nn.Module | None]] = []
        self._names: list[str] = []
        self._modules: list[nn.Module] = []
        self._lock = threading.Lock()
        # how deep each thread is in forwards of the model
        self._running: weakref.WeakKeyDictionary[threading.Thread, int] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> list[Kept]:
        return self.buffers

    def __setstate__(self, buffers: list[Kept]) -> None:
        # a copy watches its modules from the first forward on, when its hosts have to be where they were
        self._start(buffers)

    def look_at(self, model: nn.Module, hosts: dict[str, nn.Module]) -> None:
        """Watch a model from its present state on."""
        modules = own_modules(model)
        hosting = set(hosts.values())
        kept = {path: module for path, module in modules.items() if _never_trains(module) or module in hosting}
        around = {path: modules[path] for inner in kept for path in ancestors(inner) if path in modules}
        watched = {*kept.values(), *around.values()}
        found = [
            (parent._modules, name, child)
            for parent in modules.values()
            for name, child in parent._modules.items()
            if child is not None and child in watched
        ]
        with self._lock:
            known = {(id(kept.module), kept.name) for kept in self.buffers}
            buffers = [
                Kept(module, name)
                for module in modules.values()
                if frozen_class not in made_by(type(module))
                for name in module._buffers
                if (id(module), name) not in known
            ]
            self.buffers = [*self.buffers, *buffers]
            self._kept, self._around = kept, around
            self._compared = 0
            self.written.look_at(modules)
            self._children, self._names, self._modules = [[row[i] for row in found] for i in range(3)]  # type: ignore[assignment]

    def before(self, model: nn.Module, hosts: dict[str, nn.Module], nested: bool) -> bool:
        """Check the model before a forward.

        Args:
            model: the model.
            hosts: its modules with parts, by path.
            nested: whether the forward is within another.

        Returns:
            Whether all parameters are still there.

        Raises:
            VisadaptError: another module stands where a host or a frozen module was.
        """
        # of a copy nothing is known yet; a replica is of one call alone
        unknown = self._kept is None and "_is_replica" not in model.__dict__
        # in C, as a model may have hundreds of these
        if unknown or list(map(dict.get, self._children, self._names)) != self._modules:
            self._check_replaced(model, hosts)
        there = nested or self.written.before()
        if self.buffers:
            here = threading.current_thread()
            with self._lock:
                self._running[here] = self._running.get(here, 0) + 1 if nested else 1
                alone = not nested and len(self._running) == 1
                self._exact = alone and model.training and self._compared < COMPARED
                self._compared += self._exact
                for kept in self.buffers if alone else ():
                    if not kept.holds(self._exact):
                        # moved to a device, loaded or changed by the user since
                        kept.keep()
        return there

    def after(self) -> VisadaptError | None:
        """Restore the buffers that a forward changed, and keep their modules in eval mode.

        Returns:
            The error for a parameter that the forward changed.
        """
        if self.buffers:
            here = threading.current_thread()
            with self._lock:
                depth = self._running.pop(here, 1) - 1
                if depth > 0:
                    self._running[here] = depth
                for kept in self.buffers:
                    if not kept.holds(self._exact):
                        kept.put_back()
                        if not _never_trains(kept.module):
                            kept.module.__class__ = founded(type(kept.module), still_class)
        return self.written.after()

    def _check_replaced(self, model: nn.Module, hosts: dict[str, nn.Module]) -> None:
        modules = own_modules(model)
        there = set(modules.values())
        kept = hosts if self._kept is None else self._kept
        before = self._around | kept
        for inner, old in kept.items():
            if old not in there:
                # it may have gone with a module around it
                path = next(p for p in (*ancestors(inner), inner) if p in before and modules.get(p) is not before[p])
                new = modules.get(path)
                how = "removed" if new is None else "replaced"
                by = "" if new is None else f", by a {type(new).__name__}"
                raise VisadaptError(
                    f"{path} was {how} after the inject{by}: what the tasks have there would not act, and its "
                    "statistics would move. Change the backbone first (SyncBatchNorm.convert_sync_batchnorm, "
                    "reparameterize_model, fuse, say), then inject; or eject and inject again"
                )
        # each has a place elsewhere now, inside of another module
        self.look_at(model, hosts)
