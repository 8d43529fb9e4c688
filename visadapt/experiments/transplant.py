"""A task's parts: copied into another task as its initial values, or removed for a while."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.modules import joined, unwrapped, within
from visadapt.backbone.where import sites
from visadapt.errors import VisadaptError
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.runtime.registry import named_tensors, registry_of


def body_tensors(model: nn.Module, task: str) -> dict[str, Tensor]:
    """Return all tensors of a task except its head's, by name: adapters, norm copies, own weights."""
    registry = registry_of(model)
    heads = tuple(f"{joined(path, 'head')}." for path, owned in registry.parts(task).items() if "head" in owned)
    return {name: tensor for name, tensor in named_tensors(registry, task).items() if not name.startswith(heads)}


@torch.no_grad()
def start_from(model: nn.Module, task: str, source: Mapping[str, Tensor]) -> None:
    """Copy the values of another task into a task, except the head's.

    Args:
        model: an injected model.
        task: name of the task to change.
        source: values by the names of `body_tensors`; other names are ignored.

    Raises:
        VisadaptError: a value is missing or has another shape; nothing is changed then.
    """
    targets = body_tensors(model, task)
    for name, tensor in targets.items():
        if name not in source or source[name].shape != tensor.shape:
            shape = tuple(tensor.shape)
            raise VisadaptError(f"task {task!r} cannot start from another task without {name} of shape {shape}")
    for name, tensor in targets.items():
        tensor.copy_(source[name])


def count_layers(problem: Problem, contender: Contender) -> int:
    """Count the layers of a problem's backbone by the sites that a contender's method adapts.

    Raises:
        VisadaptError: the method adapts no site of this backbone.
    """
    count = _layer_count(problem, contender.method.kinds)
    if not count:
        raise VisadaptError(
            f"the contender must have adapters in the layers of {problem.network}, such as 'bottleneck m=8'; "
            f"got {contender.name!r}"
        )
    return count


@lru_cache(maxsize=32)
def _layer_count(problem: Problem, kinds: tuple[str, ...]) -> int:
    return 1 + max((site.depth for site in sites(problem.fresh()) if site.kind in kinds), default=-1)


def host_depths(model: nn.Module, task: str) -> dict[str, int]:
    """Return the depth of each host module of a task, by path; hosts outside all blocks (stem, head) are left out."""
    depths: dict[str, int] = {}
    all_sites = sites(unwrapped(model))
    for path in registry_of(model).task(task).hosts:
        for site in all_sites:
            if path == site.host or (site.block and within(path, [site.block])):
                depths[path] = site.depth
                break
    return depths


@contextmanager
def without_layers(model: nn.Module, task: str, removed: Container[int], *, norms: bool) -> Iterator[nn.Module]:
    """Remove a task's parts at some depths within the block, so that the backbone's own modules act there.

    Not thread-safe: the parts are removed from the model, and then put back in the same order.

    Args:
        model: an injected model.
        task: name of the task.
        removed: depths, as `visadapt.sites` counts them.
        norms: also remove the task's own norms.

    Yields:
        The same model.
    """
    registry = registry_of(model)
    changed: list[tuple[dict[str, Any], dict[str, Any]]] = []
    hosts = {path for path, depth in host_depths(model, task).items() if depth in removed}
    try:
        for path, owned in registry.parts(task).items():
            if path in hosts:
                modules: dict[str, Any] = owned._modules
                changed.append((modules, dict(modules)))
                for name in [name for name in modules if name != "head" and (norms or name != "norm")]:
                    del modules[name]
        yield model
    finally:
        for modules, before in changed:
            modules.clear()
            modules.update(before)
