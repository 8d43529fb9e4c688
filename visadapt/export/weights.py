"""The weights that a merge writes: computed in float64, rounded once, and refused if rounding loses a change."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from visadapt.backbone.modules import joined
from visadapt.backbone.stored_values import is_stored_otherwise
from visadapt.errors import VisadaptError

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest error of a merge, relative to what the task changes, by the lowest precision in it."""

LOW_TOLERANCE = 0.1
"""The same for half precision, whose own rounding is a percent of a network's outputs."""

Slot = tuple[nn.Module, str]


def tolerance(dtype: torch.dtype) -> float:
    """The largest error, relative to what a task changes, that counts as rounding."""
    return TOLERANCE.get(dtype, LOW_TOLERANCE)


class Weights:
    """The parameters and buffers of a plain model while a task is written into them.

    Args:
        plain: the model; nothing in it is changed before `settle`.
    """

    def __init__(self, plain: nn.Module) -> None:
        self.plain = plain
        self._values: dict[Slot, Tensor] = {}
        self._what: dict[Slot, str] = {}

    def __contains__(self, slot: Slot) -> bool:
        module, name = slot
        return module._parameters.get(name) is not None or module._buffers.get(name) is not None

    def read(self, module: nn.Module, name: str) -> Tensor:
        """The present value of a tensor, in float64.

        Raises:
            VisadaptError: its values are stored in other tensors, as those of a quantised weight are.
        """
        present = self.present(module, name)
        if is_stored_otherwise(present):
            paths = {module: path for path, module in self.plain.named_modules()}
            raise VisadaptError(
                f"nothing can be merged into {joined(paths.get(module, ''), name)}, which is stored as a "
                f"{type(present).__name__}: merge tasks of a backbone that is not quantised"
            )
        return present.double()

    def present(self, module: nn.Module, name: str) -> Tensor:
        """The present value of a tensor, in its own dtype if nothing was written to it yet."""
        own = self._values.get((module, name))
        return _tensor(module, name) if own is None else own

    def write(self, module: nn.Module, name: str, value: Tensor, what: str) -> None:
        """Change a tensor.

        Args:
            module: that it belongs to.
            name: of the parameter or buffer.
            value: of the same number of elements.
            what: is being merged, for errors.
        """
        self._values[module, name] = value.detach().double().reshape(_tensor(module, name).shape)
        self._what[module, name] = what

    def written(self) -> Iterator[tuple[str, str]]:
        """Names of the tensors that were written, and the part that was written there."""
        paths = {module: path for path, module in self.plain.named_modules()}
        for (module, name), what in self._what.items():
            if module in paths:
                yield joined(paths[module], name), what

    @torch.no_grad()
    def settle(self, measured: bool) -> None:
        """Round everything to its own dtype and put it into the model.

        Args:
            measured: whether the merged model will be compared with the task; if not, the rounding error of each change
                must be within the tolerance.

        Raises:
            VisadaptError: a weight is tied to one that the task leaves as it is, or does not fit its dtype.
        """
        changed = {slot: value for slot, value in self._values.items() if not torch.equal(value, _double(slot))}
        self._check_ties(changed)
        for slot, value in changed.items():
            _check_rounding(value, _tensor(*slot), slot[1], self._what[slot], measured)
        for slot, value in changed.items():
            _tensor(*slot).copy_(value)

    def _check_ties(self, changed: dict[Slot, Tensor]) -> None:
        """Refuse a change to memory that several tensors share, unless all of them get the same values."""
        paths = {module: path for path, module in self.plain.named_modules()}
        spans = [
            (*_span(tensor), (module, name))
            for module in paths
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]
        for slot, value in changed.items():
            own = _tensor(*slot)
            start, end = _span(own)
            for first, last, other in spans:
                if other == slot or last <= start or first >= end:
                    continue
                if _tensor(*other) is not own or not torch.equal(self.read(*other), value):
                    here, there = (joined(paths.get(module, ""), name) for module, name in (slot, other))
                    raise VisadaptError(
                        f"the {self._what[slot]} cannot be merged: {here} is tied to {there}, which the task leaves as "
                        "it is"
                    )


def _check_rounding(value: Tensor, own: Tensor, name: str, what: str, measured: bool) -> None:
    """Refuse a value that overflows the dtype of its tensor, or (unmeasured) loses much of its change there."""
    rounded = value.to(own.dtype)
    if own.isfinite().all() and not rounded.isfinite().all():
        raise VisadaptError(f"the {what} cannot be merged: the {name} that it makes overflows {own.dtype}")
    lost, change = (value - rounded.double()).norm(), (value - own.double()).norm()
    if not measured and lost > tolerance(own.dtype) * change:
        raise VisadaptError(
            f"the {what} cannot be merged: rounding to {own.dtype} takes {float(lost / change):.1%} of what it changes "
            f"in the {name}. Merge in a wider dtype, or give probe= an input to measure the error on"
        )


def _tensor(module: nn.Module, name: str) -> Tensor:
    found: Tensor | None = module._parameters.get(name)
    found = module._buffers.get(name) if found is None else found
    assert found is not None
    return found


def _double(slot: Slot) -> Tensor:
    return _tensor(*slot).double()


def _span(tensor: Tensor) -> tuple[int, int]:
    """The range of addresses of a tensor; empty for one without elements or memory."""
    if tensor.numel() == 0 or tensor.is_meta:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()
