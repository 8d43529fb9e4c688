"""What is trained: a task of an injected model, or a plain network as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone import heads
from visadapt.backbone.norms import is_norm
from visadapt.errors import VisadaptError
from visadapt.runtime.parameters_of import named_parameters
from visadapt.runtime.registry import find_registry, named_tensors, prefix_of, registry_of
from visadapt.runtime.selection import using


@dataclass
class Trainee:
    """The parameters to move, the tensors that make up a state, and the context to run the model in.

    Attributes:
        name: what it is called in messages.
        parameters: those that are trained, by name.
        tensors: everything that training can change (parameters and running statistics), by name.
        norms: names of parameters that belong to norms.
        head: names of parameters of the head.
        adapters: names of parameters that the task's methods put in.
        classes: width of the head, where it is known.
        chosen: makes the context in which the model performs the task.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    tensors: dict[str, Tensor]
    norms: set[str]
    head: set[str]
    adapters: set[str]
    classes: int | None
    chosen: Callable[[], AbstractContextManager[Any]]

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the state, in memory."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Writes a state back into the very same tensors."""
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])


def trainee(model: nn.Module, task: str | None) -> Trainee:
    """What a task of an injected model trains, or, with ``task=None``, what a plain module trains.

    Raises:
        VisadaptError: there is no such task; None for an injected model; nothing to train.
    """
    if task is None:
        return _plain(model)
    registry = registry_of(model)
    spec = registry.task(task)
    found = dict(named_parameters(model, task))
    norms: set[str] = set()
    head: set[str] = set()
    adapters: set[str] = set()
    for path, parts in registry.parts(task).items():
        for part, root in parts.items():
            for inner, module in root.named_modules():
                at = prefix_of(path, part, root) + (f"{inner}." if inner else "")
                own = {f"{at}{name}" for name in module._parameters}
                head |= own if part == "head" else set()
                adapters |= own if part not in ("head", "norm") else set()
                norms |= own if part == "norm" or _is_norm(module) else set()
    if not found:
        raise VisadaptError(f"task {task!r} has no parameters to train")
    tensors = named_tensors(registry, task)
    name = f"task {task!r}"
    return Trainee(name, found, tensors, norms, head, adapters, spec.num_classes, lambda: using(model, task))


@contextmanager
def alone(model: nn.Module, trained: Trainee, processes: int) -> Iterator[None]:
    """Has nothing else ask for a gradient among several processes: DDP refuses what a step does not use."""
    own = {id(p) for p in trained.parameters.values()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in own] if processes > 1 else []
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _plain(model: nn.Module) -> Trainee:
    if find_registry(model) is not None:
        raise VisadaptError("this model has tasks: say which one to train; None is for a plain module, as a whole")
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise VisadaptError(f"no parameter of this {type(model).__name__} requires a gradient")
    end = heads.find_head(model)
    return Trainee(
        type(model).__name__,
        found,
        dict(model.state_dict(keep_vars=True)),
        {f"{path}.{k}" if path else k for path, m in model.named_modules() if _is_norm(m) for k in m._parameters},
        {name for name in found if end and any(name.startswith(f"{path}.") for path in end.modules)},
        set(),
        heads.width_of(model.get_submodule(end.final)) if end else None,
        nullcontext,
    )


def _is_norm(module: nn.Module) -> bool:
    # a norm over whole maps has gains of several dimensions, which no task can own, but which must not decay either
    return is_norm(module) or "norm" in type(module).__name__.lower()
