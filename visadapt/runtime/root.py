"""The call of a whole model: which task is meant is captured where it begins, and checked where it ends."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from visadapt.backbone.modules import REGISTRY
from visadapt.backbone.subclass import ModuleClass, cached, subclass
from visadapt.runtime.registry import Registry


@cached
def root_class(plain: ModuleClass) -> ModuleClass:
    """A subclass of an injected model's whose calls are each for the task that is meant where they begin.

    What is chosen during a call, here or in another thread, is for later ones. A call during which its task is removed
    is an error.
    """

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        registry: Registry | None = self.__dict__.get(REGISTRY)
        if registry is None or torch.compiler.is_dynamo_compiling():
            return plain.__call__(self, *args, **kwargs)
        block = registry.begin()
        try:
            out = plain.__call__(self, *args, **kwargs)
        finally:
            registry.finish(block)
        registry.check(block)
        return out

    def replicate(self: nn.Module) -> nn.Module:
        replica = plain._replicate_for_data_parallel(self)  # type: ignore[no-untyped-call]
        registry: Registry | None = self.__dict__.get(REGISTRY)
        if registry is not None:
            replica.__dict__[REGISTRY] = registry.held()
        return cast("nn.Module", replica)

    return subclass(plain, root_class, __call__=call, _replicate_for_data_parallel=replicate)
