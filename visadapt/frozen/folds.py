"""Folding at run time: a frozen conv also applies the eval-mode BatchNorm that follows it."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from functools import update_wrapper
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from visadapt.backbone.autocast import is_autocast
from visadapt.backbone.batch import mapped
from visadapt.backbone.batchnorm import folded, is_watched
from visadapt.backbone.compact import Compact, Stored
from visadapt.backbone.modules import LEAN
from visadapt.backbone.norms import scale_and_shift
from visadapt.backbone.operators import as_kernel
from visadapt.backbone.subclass import cached, subclass
from visadapt.backbone.tracing import is_tracing
from visadapt.errors import VisadaptError
from visadapt.frozen.checksums import Checksums
from visadapt.frozen.functions import version
from visadapt.runtime.choice import AUTO
from visadapt.runtime.registry import Registry, parts_of
from visadapt.runtime.roles import role

FOLDED = "_visadapt_folded"
"""Attribute of a conv's output that its norm must pass through unchanged: the pair, and the tensor's version."""


class Pair:
    """A conv and the BatchNorm that is the only consumer of its output.

    Args:
        folds: the model's `Folds`.
        conv: the conv.
        norm: the norm.
    """

    def __init__(self, folds: Folds, conv: nn.Conv2d, norm: _BatchNorm) -> None:
        self.folds, self.conv, self.norm = folds, conv, norm

    def begin(self, conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the folded kernel and bias if the conv should apply the norm in this call; None otherwise.

        It should not if the conv is called outside a forward of the whole model, if the task changes the folded
        weights, if a hook would see the difference, or if the batch is a single sample: checking that the weights have
        not changed then takes as long as a ResNet's norms do.
        """
        if is_tracing():
            # torch.compile fuses norms itself
            return None
        run = _RUN.get()
        if run is None or run.folds is not self.folds or conv is not self.conv or len(x) == 1:
            return None
        if is_watched(self.conv) or is_watched(self.norm) or _any_global_hook() or self._owned():
            return None
        found = run.weights().get(self)
        if found is not None:
            run.begun.add(self)
        return found

    def end(self, x: Tensor) -> bool:
        """Return whether the norm was already applied to this input."""
        if is_tracing() or getattr(x, FOLDED, None) != (self, version(x)):
            return False
        delattr(x, FOLDED)
        run = _RUN.get()
        if run is not None:
            run.begun.discard(self)
        return True

    def _owned(self) -> bool:
        """Return whether an active task changes the folded weights, or the tasks are not chosen yet."""
        current = self.folds.registry.current()
        tasks = current if isinstance(current, tuple) else (current,)
        return current == AUTO or any(self._owned_by(task) for task in set(tasks) if task is not None)

    def _owned_by(self, task: str) -> bool:
        at_norm = parts_of(self.norm, task)
        weights = any(role(part) == "weights" for part in at_norm.values())
        return bool(parts_of(self.conv, task)) or "norm" in at_norm or weights

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are folded."""
        conv, norm = self.conv._parameters, self.norm
        found = (conv.get("weight"), conv.get("bias"), *norm._parameters.values(), norm.running_mean, norm.running_var)
        held = (t.stored.values if isinstance(t, Compact) else t for t in found)
        return [t for t in held if t is not None]

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return the kernel and bias that compute conv and norm together; compact if the conv's weight is compact."""
        weight = self.conv._parameters["weight"]
        if not isinstance(weight, Compact):
            return folded(self.conv, self.norm)
        scale, shift = scale_and_shift(self.norm)
        if self.conv.bias is not None:
            shift = self.conv.bias.double() * scale + shift
        held, factors = weight.stored, as_kernel(scale[:, None], weight.ndim - 2)
        if held.scale is None:
            # rounded once, from the exact weight
            kernel = (held.exact() * factors).to(held.values.dtype, memory_format=torch.preserve_format)
            return kernel, shift.to(held.dtype)
        # the same codes: scaling a channel only changes its scale
        return Compact(Stored(held.values, (held.scale * factors).float(), held.dtype)), shift.to(held.dtype)


class Folds:
    """The pairs of a lean model, and their folded weights: W' = s·W and b' = s·b + t.

    The folded weights are computed at first use, and again when a forward of the whole model finds that the original
    weights were replaced, moved or written to.

    Attributes:
        anchor: a module whose compact weight has the device and dtype of the model; None if there is none.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.anchor: nn.Module | None = None
        self.pairs: list[Pair] = []
        self._made: tuple[Any, dict[Pair, tuple[Tensor, Tensor]]] | None = None

    def add(self, model: nn.Module, paths: Iterable[tuple[str, str]]) -> dict[nn.Module, Pair]:
        """Add pairs by their paths; return a dict with each pair under its conv and under its norm."""
        found: dict[nn.Module, Pair] = {}
        for conv_path, norm_path in paths:
            conv, norm = model.get_submodule(conv_path), model.get_submodule(norm_path)
            pair = Pair(self, cast("nn.Conv2d", conv), cast("_BatchNorm", norm))
            self.pairs.append(pair)
            found[conv] = found[norm] = pair
        return found

    @torch.no_grad()
    def weights(self) -> dict[Pair, tuple[Tensor, Tensor]]:
        """Return the folded kernel and bias of each pair that can be folded."""
        tensors = [pair.tensors() for pair in self.pairs]
        now = [t.device for each in tensors for t in each], Checksums([t for each in tensors for t in each])
        made = self._made
        if made is None or made[0] != now:
            # not inference tensors: a later forward may need gradients through them
            with torch.inference_mode(False):
                new = {pair: pair.folded() for pair in self.pairs if _is_plain(pair.conv)}
            # a pair whose folded kernel overflows its dtype is not folded
            made = self._made = (
                now,
                {pair: both for pair, both in new.items() if all(t.isfinite().all() for t in both)},
            )
        return made[1]


class _Run:
    """One forward of the whole model.

    Attributes:
        begun: pairs whose conv has applied the norm, and whose norm was not called yet.
    """

    def __init__(self, folds: Folds) -> None:
        self.folds = folds
        self.begun: set[Pair] = set()
        self._weights: dict[Pair, tuple[Tensor, Tensor]] | None = None

    def weights(self) -> dict[Pair, tuple[Tensor, Tensor]]:
        """Return the folded weights, checked once per forward."""
        if self._weights is None:
            self._weights = self.folds.weights()
        return self._weights


_RUN: ContextVar[_Run | None] = ContextVar("visadapt_folding", default=None)


@cached
def lean_root(plain: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose forward lets convs apply their norms, and computes in the dtype of the frozen layers."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        compute = self.__dict__[LEAN].registry.lean.compute
        if compute is None:
            return folding(self, *args, **kwargs)
        weight = self.__dict__[LEAN].anchor._parameters["weight"]
        device, given = weight.device.type, weight.dtype
        outer = is_autocast(device)
        with torch.autocast(device, compute):
            out = folding(self, *args, **kwargs)
        return out if outer else _widened(out, compute, given)

    def folding(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_tracing() or torch._C._get_tracing_state() is not None or _is_capturing():
            return plain.forward(self, *args, **kwargs)
        run = _Run(self.__dict__[LEAN])
        token = _RUN.set(run)
        try:
            out = plain.forward(self, *args, **kwargs)
        finally:
            _RUN.reset(token)
        if run.begun:
            raise VisadaptError(
                f"a {type(next(iter(run.begun)).conv).__name__} gave its output to something else than the norm that "
                "took it when lean was called: call unlean, then lean with an example= for which the model takes this "
                "path"
            )
        return out

    return subclass(plain, lean_root, forward=update_wrapper(forward, plain.forward))


def _widened(out: Any, narrow: torch.dtype, wide: torch.dtype) -> Any:
    """Return a model's output with its ``narrow`` tensors converted to ``wide``, in any container."""
    return mapped(lambda _, leaf: leaf.to(wide) if isinstance(leaf, Tensor) and leaf.dtype == narrow else leaf, out)


def _is_capturing() -> bool:
    # weights cannot be compared while a CUDA graph is captured
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _any_global_hook() -> bool:
    return any(
        getattr(torch_module, f"_global_{name}")
        for name in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    )


def _is_plain(conv: nn.Module) -> bool:
    """Return whether a conv's weight is a plain parameter: not sharded, quantised or recomputed by each forward."""
    return type(conv._parameters.get("weight")) in (nn.Parameter, Compact)
