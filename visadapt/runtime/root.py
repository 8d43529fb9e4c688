"""The call of a whole model: the active task is captured where it begins, and moved tensors are restored at its end."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from visadapt.backbone.modules import CHILD, OURS, REGISTRY
from visadapt.backbone.tracing import is_tracing
from visadapt.runtime.registry import Parts, Registry, check_filled
from visadapt.runtime.weights import check_there


def capture_calls(model: nn.Module) -> None:
    """Run each call of a model for the tasks that are active at its start, and leave the backbone as it was.

    A choice made during a call, here or in another thread, applies to later calls. Removing a task during its own
    call is an error.

    Args:
        model: an injected model. It gets two hooks, which ``unfreeze`` removes.
    """
    model.register_forward_pre_hook(_enter, prepend=True)
    model.register_forward_hook(_leave, always_call=True)


def _enter(model: nn.Module, args: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    registry: Registry | None = model.__dict__.get(REGISTRY)
    if registry is not None:
        if model.__dict__.get("_is_replica"):
            registry = model.__dict__[REGISTRY] = _held(model, registry)
        block = registry.begin(sys._getframe(1))
        if registry.unfilled:
            check_filled(registry, block.tasks if isinstance(block.tasks, tuple) else (block.tasks,))
        nested = block.below is not None and block.below.captured
        if not is_tracing() and not registry.watch.before(model, registry.hosts, nested):
            for host in registry.hosts.values():
                check_there(host)


def _leave(model: nn.Module, args: Any, out: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    registry: Registry | None = model.__dict__.get(REGISTRY)
    if registry is not None:
        block = registry.finish(sys._getframe(1))
        if block is None:
            return
        error = None if is_tracing() else registry.watch.after()
        if out is not None:
            registry.check(block)
            if error is not None:
                raise error


def _held(replica: nn.Module, registry: Registry) -> Registry:
    """The choices of a replica of DataParallel, which its parts have kept since it was made."""
    for path in registry.hosts:
        parts = replica.get_submodule(path)._modules.get(CHILD)
        if isinstance(parts, Parts):
            return parts._registry
    return registry


for _hook in (_enter, _leave):
    _hook.__dict__[OURS] = True
