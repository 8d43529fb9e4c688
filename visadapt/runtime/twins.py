"""Copies of a model that share all its tensors and have their own modes and hooks."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from visadapt.backbone.modules import own_modules, plain_copy, unwrapped
from visadapt.backbone.structure import STRUCTURE
from visadapt.runtime.registry import registry_of
from visadapt.runtime.task_modules import copying_only


def task_twin(model: nn.Module, task: str) -> nn.Module | None:
    """A copy of a model that has one of its tasks only and computes with the same parameters and buffers.

    Its modes are its own: what is trained in it changes the task's tensors, and nothing that the model's other tasks
    read. Tensors that are moved to another device in one are moved in the other.

    Args:
        model: an injected model.
        task: name of the task.

    Returns:
        The copy, with the task active; None if something in the model cannot be copied.
    """
    with STRUCTURE:
        registry = registry_of(model)
        registry.task(task)
        backbone = unwrapped(model)
        memo = _shared(backbone)
        for own in registry.parts(task).values():
            memo.update(_shared(own))
        # the other tasks' entries are left out, so they are not copied first
        for known in (registry.tasks, registry.configs):
            memo[id(known)] = {name: copy.deepcopy(value, memo) for name, value in known.items() if name == task}
        try:
            with copying_only(task):
                twin = copy.deepcopy(backbone, memo)
        except Exception:  # a module that holds a lock, a file or a part of a graph may raise anything
            return None
        own_registry = registry_of(twin)
        own_registry.choose(task)
        own_registry.watch.look_at(twin, own_registry.hosts)
        return twin


def bare_twin(model: nn.Module) -> nn.Module:
    """A copy of a model's bare backbone in eval mode, which computes with the same parameters and buffers."""
    with STRUCTURE:
        backbone = unwrapped(model)
        return plain_copy(backbone, _shared(backbone)).eval()


def _shared(module: nn.Module) -> dict[int, Any]:
    """What ``copy.deepcopy`` must not copy: tensors, and the dicts that hold them."""
    memo: dict[int, Any] = {}
    for inner in own_modules(module).values():
        memo |= {id(each): each for each in (inner._parameters, inner._buffers)}
        held = (*inner._parameters.values(), *inner._buffers.values(), *inner.__dict__.values())
        memo |= {id(tensor): tensor for tensor in held if isinstance(tensor, Tensor)}
    return memo
