"""A task's parts, taken as a start by another task, or left out for a while."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.modules import joined, unwrapped
from visadapt.backbone.where import sites
from visadapt.errors import VisadaptError
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.runtime.registry import named_tensors, registry_of


def body(model: nn.Module, task: str) -> dict[str, Tensor]:
    """All tensors of a task but those of its head, by name: adapters, norm copies, weights of its own."""
    registry = registry_of(model)
    heads = tuple(f"{joined(path, 'head')}." for path, owned in registry.parts(task).items() if "head" in owned)
    return {name: tensor for name, tensor in named_tensors(registry, task).items() if not name.startswith(heads)}


@torch.no_grad()
def start_from(model: nn.Module, task: str, source: Mapping[str, Tensor]) -> None:
    """Gives a task another's values, in all but the head.

    Args:
        model: that has the task.
        task: its name.
        source: values by the names that :func:`body` gives; other names are passed by.

    Raises:
        VisadaptError: a value is missing, or has another shape. Nothing was changed then.
    """
    own = body(model, task)
    for name, tensor in own.items():
        if name not in source or source[name].shape != tensor.shape:
            raise VisadaptError(f"task {task!r} cannot start from the other: that has no {name} of its shape")
    for name, tensor in own.items():
        tensor.copy_(source[name])


def layers(problem: Problem, who: Contender) -> int:
    """How many layers a problem's backbone has, counted by the sites where a contender's adapters stand.

    Raises:
        VisadaptError: it has no adapters, or none that stand in this backbone.
    """
    count = _layers(problem, who.method.kinds)
    if not count:
        raise VisadaptError(f"{who.name!r} puts no adapters into layers of {problem.network}; 'bottleneck m=8' does")
    return count


@lru_cache(maxsize=32)
def _layers(problem: Problem, kinds: tuple[str, ...]) -> int:
    return 1 + max((site.depth for site in sites(problem.fresh()) if site.kind in kinds), default=-1)


def depths(model: nn.Module, task: str) -> dict[str, int]:
    """At which depth each host of a task stands; those outside all blocks (the stem, the head) are not among them."""
    found: dict[str, int] = {}
    places = sites(unwrapped(model))
    for path in registry_of(model).task(task).hosts:
        for site in places:
            if path == site.host or (site.block and f"{path}.".startswith(f"{site.block}.")):
                found[path] = site.depth
                break
    return found


@contextmanager
def without(model: nn.Module, task: str, at: Container[int], *, norms: bool) -> Iterator[nn.Module]:
    """Within the block, a task acts without its parts at some depths; the backbone's own act there.

    Not for several threads at once: the parts are really taken out, and put back in the same order.

    Args:
        model: an injected model.
        task: its name.
        at: depths, as :func:`visadapt.sites` counts them.
        norms: whether the task's own norms there go too; otherwise they stay in place.

    Yields:
        The same model.
    """
    registry = registry_of(model)
    taken: list[tuple[dict[str, Any], dict[str, Any]]] = []
    at_hosts = {path for path, depth in depths(model, task).items() if depth in at}
    try:
        for path, owned in registry.parts(task).items():
            if path in at_hosts:
                modules: dict[str, Any] = owned._modules
                taken.append((modules, dict(modules)))
                for name in [name for name in modules if name != "head" and (norms or name != "norm")]:
                    del modules[name]
        yield model
    finally:
        for modules, before in taken:
            modules.clear()
            modules.update(before)
