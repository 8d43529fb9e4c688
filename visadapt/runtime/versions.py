"""Which parameters of a backbone changed since it was frozen, by torch's own count of writes."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn


class Versions:
    """The parameters of a model at one moment, without keeping them alive.

    A copied or unpickled model counts from zero again; what had changed before stays known.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known = {name: (weakref.ref(p), _version(p)) for name, p in model.named_parameters()}

    def moved(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter was replaced, was written to, or has a gradient."""
        known, version = self._known.get(name, (None, -1))
        same = known is not None and known() is parameter and version == _version(parameter)
        return not same or parameter.grad is not None

    def __getstate__(self) -> dict[str, tuple[nn.Parameter, bool]]:
        alive = {name: (known(), version) for name, (known, version) in self._known.items()}
        return {name: (p, version == _version(p)) for name, (p, version) in alive.items() if p is not None}

    def __setstate__(self, state: dict[str, tuple[nn.Parameter, bool]]) -> None:
        self._known = {name: (weakref.ref(p), _version(p) if same else -1) for name, (p, same) in state.items()}


def _version(parameter: Any) -> int:
    # inference tensors cannot be written to, and do not count
    return 0 if parameter.is_inference() else int(parameter._version)
