"""Where a batch enters a backbone: the method of the module that is called first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from visadapt.backbone.modules import joined


class Entry(NamedTuple):
    """One method of one module of a backbone.

    Attributes:
        path: of the module, "" for the whole backbone.
        method: name of the method.
    """

    path: str = ""
    method: str = "forward"

    def of(self, backbone: nn.Module) -> Callable[..., Any]:
        """The callable in a backbone or a copy of one: the module itself if the method is its forward."""
        module = backbone.get_submodule(self.path)
        return module if self.method == "forward" else getattr(module, self.method)  # type: ignore[no-any-return]

    def shown(self, backbone: nn.Module) -> str:
        """Its name in messages: the model's class, or the path of the method in the model."""
        name = type(backbone).__name__
        return name if self == WHOLE else f"{name}.{joined(self.path, self.method)}"


WHOLE = Entry()
"""The whole backbone's forward."""
