"""The target of a training run: one task of an injected model, or a plain module as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.facts import Facts
from visadapt.backbone.modules import inside, joined
from visadapt.backbone.norms import is_norm
from visadapt.errors import VisadaptError
from visadapt.runtime.parameters_of import named_parameters
from visadapt.runtime.registry import find_registry, named_tensors, prefix_of, registry_of
from visadapt.runtime.selection import using


@dataclass
class Target:
    """What to train: parameters with their roles, all tensors of the state, and the context to run the model in.

    Attributes:
        name: for messages.
        parameters: the trained parameters, by name.
        tensors: everything that training may change (parameters and running statistics), by name.
        norms: names of parameters that belong to norms.
        head: names of parameters of the head.
        adapters: names of parameters that the task's methods added.
        classes: width of the head, if known.
        context: returns a context manager that makes the task active.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    tensors: dict[str, Tensor]
    norms: set[str]
    head: set[str]
    adapters: set[str]
    classes: int | None
    context: Callable[[], AbstractContextManager[Any]]

    def snapshot(self) -> dict[str, Tensor]:
        """Copy the state, in memory."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Copy a snapshot back into the same tensors."""
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])


def target_of(model: nn.Module, task: str | None) -> Target:
    """The target for a task of an injected model or, with ``task=None``, for a plain module.

    Raises:
        VisadaptError: the task does not exist, is None for an injected model, or has nothing to train.
    """
    if task is None:
        return _plain(model)
    registry = registry_of(model)
    spec = registry.task(task)
    parameters = dict(named_parameters(model, task))
    norms: set[str] = set()
    head: set[str] = set()
    adapters: set[str] = set()
    for path, parts in registry.parts(task).items():
        for part, root in parts.items():
            for inner, module in root.named_modules():
                at = prefix_of(path, part, root) + (f"{inner}." if inner else "")
                names = {f"{at}{name}" for name in module._parameters}
                head |= names if part == "head" else set()
                adapters |= names if part not in ("head", "norm") else set()
                norms |= names if part == "norm" or _is_norm(module) else set()
    if not parameters:
        raise VisadaptError(f"task {task!r} has no parameters to train")
    return Target(
        name=f"task {task!r}",
        parameters=parameters,
        tensors=named_tensors(registry, task),
        norms=norms,
        head=head,
        adapters=adapters,
        classes=spec.num_classes,
        context=lambda: using(model, task),
    )


@contextmanager
def only_trainable(model: nn.Module, target: Target, processes: int) -> Iterator[None]:
    """Freeze all other parameters if there are several processes: DDP refuses parameters that a step does not use."""
    trained = {id(p) for p in target.parameters.values()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in trained] if processes > 1 else []
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _plain(model: nn.Module) -> Target:
    if find_registry(model) is not None:
        raise VisadaptError("task must be a name for a model that has tasks, got None, which is for plain modules")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise VisadaptError(f"no parameter of this {type(model).__name__} requires a gradient")
    facts = Facts(model)
    head = facts.head
    return Target(
        name=type(model).__name__,
        parameters=parameters,
        tensors=dict(model.state_dict(keep_vars=True)),
        norms={joined(path, name) for path, m in model.named_modules() if _is_norm(m) for name in m._parameters},
        head={name for name in parameters if head and any(inside(name, path) for path in head.modules)},
        adapters=set(),
        classes=head.classes(facts.modules) if head else None,
        context=nullcontext,
    )


def _is_norm(module: nn.Module) -> bool:
    # a LayerNorm over whole maps has multi-dimensional gains: no task can own them, but they must not decay either
    return is_norm(module) or "norm" in type(module).__name__.lower()
