"""The backbone's own modules and parameters, seen without those of any task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from visadapt.backbone.compact import Compact
from visadapt.backbone.stored_values import packed_tensors
from visadapt.backbone.subclass import made_by, stripped

ModelT = TypeVar("ModelT", bound=nn.Module)
"""The class of the user's model, kept by functions that return the model they were given."""

CHILD = "visadapt"
"""Name of the host's child that holds the tasks' parts."""

LEAN = "_visadapt_lean"
"""Attribute of a module that `visadapt.lean` made lean."""

PREFIX = "_visadapt_prefix"
"""Attribute of a module that cached prefixes skip: how many skip it."""

UNFUSED = "_visadapt_unfused"
"""Attribute of a module that is kept off its fused kernel while a task is active."""

FORWARDS = "_visadapt_forwards"
"""Attribute of a host that holds the forwards that other libraries gave to this very module, the outermost last."""

REGISTRY = "_visadapt"
"""Attribute of an injected model that holds its registry."""

ENTERED = "_visadapt_entered"
"""Attribute of a module inside an injected model at which batches of mixed tasks may enter."""

OURS = "_visadapt_hook"
"""Attribute that marks visadapt's hooks."""

_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.MultiheadAttention)


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a layer that mixes channels: torch's own, or any with a weight matrix but an embedding."""
    if isinstance(module, _MATRICES):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def stacked_matrices(module: nn.Module) -> int:
    """Number of a module's own stacks of matrices, such as one matrix per expert.

    Two or more own matrices count too, which experts keep one below the other; one may be a table of positions.
    """
    own = [p.ndim for p in module._parameters.values() if p is not None and p.ndim in (2, 3) and min(p.shape) > 1]
    return own.count(3) + (own.count(2) if own.count(2) > 1 and not is_matrix(module) else 0)


def inside(path: str, root: str) -> bool:
    """Whether a path is below another one, and not that one itself."""
    return path != root and path.startswith(f"{root}." if root else "")


def ancestors(path: str) -> list[str]:
    """Paths of the modules that a module or tensor is in, from the root ``""`` to the innermost."""
    names = path.split(".")
    return [".".join(names[:count]) for count in range(len(names))]


def within(path: str, roots: Iterable[str]) -> bool:
    """Whether a path is one of ``roots`` or below it."""
    return any(path == root or inside(path, root) for root in roots)


def is_stateful(module: nn.Module) -> bool:
    """Whether the module keeps running statistics, which training would move (BatchNorm and its kin)."""
    return any(name.startswith("running_") and value is not None for name, value in module._buffers.items())


def release_forward(module: nn.Module) -> None:
    """Restore the forward that was assigned to a host as an instance attribute."""
    if forwards := module.__dict__.get(FORWARDS):
        module.__dict__["forward"] = forwards[-1]
        if len(forwards) == 1:
            # of several, an outer one may call an inner one through the host's attribute
            del module.__dict__[FORWARDS]


def drop_hooks(module: nn.Module) -> None:
    """Remove visadapt's hooks."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, OURS, False)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def unfreeze(module: nn.Module) -> None:
    """Restore the original class of a module without parts."""
    module.__dict__.pop(LEAN, None)
    module.__dict__.pop(PREFIX, None)
    module.__dict__.pop(UNFUSED, None)
    module.__dict__.pop(ENTERED, None)
    release_forward(module)
    drop_hooks(module)
    if made_by(type(module)):
        module.__class__ = stripped(type(module))


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a wrapper of ``torch.compile``, DataParallel or DistributedDataParallel."""
    while REGISTRY not in model.__dict__:
        # by class, not by the child's name: a user's model may call its only child ``module``
        parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        inner = model._modules.get("module" if parallel else "_orig_mod")
        if inner is None:
            break
        model = inner
    return model


def joined(path: str, name: str) -> str:
    """``path.name``, or the one of them that is not empty: the root has no name."""
    return f"{path}.{name}" if path and name else path or name


def relative(path: str, root: str) -> str:
    """Path that a module of the model has in the one at ``root``, which is around it or the module itself."""
    return path.removeprefix(root).removeprefix(".")


def parent(path: str) -> str:
    """Path of the module that holds a module, or the parameter or buffer, of this path."""
    return path.rpartition(".")[0]


def last_name(path: str) -> str:
    """Name of a module, parameter or buffer in the module that holds it."""
    return path.rpartition(".")[2]


def below(modules: Mapping[str, nn.Module], path: str) -> dict[str, nn.Module]:
    """The modules that are inside the one at ``path``, by their path in the model."""
    return {name: module for name, module in modules.items() if inside(name, path)}


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, packed ones included, without those of visadapt's tasks."""
    packed = (tensor for inner in own_modules(module).values() for tensor in packed_tensors(inner).values())
    return sum(p.numel() for p in (*own_parameters(module), *packed))


def own_parameters(module: nn.Module) -> set[nn.Parameter]:
    """The backbone's parameters, each once; tasks, of which there may be thousands, are not visited."""
    return {p for inner in own_modules(module).values() for p in inner._parameters.values() if p is not None}


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of the backbone by path, without those of visadapt's tasks."""
    return walked(model, lambda module: {k: v for k, v in module._modules.items() if k != CHILD})


def walked(model: nn.Module, children: Callable[[nn.Module], Mapping[str, nn.Module | None]]) -> dict[str, nn.Module]:
    """The modules below a model by path, each once.

    Args:
        model: the model.
        children: returns the children of a module, by name.
    """
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, path: str) -> None:
        if module in seen:
            return
        seen.add(module)
        found[path] = module
        for name, child in children(module).items():
            if child is not None:
                visit(child, joined(path, name))

    visit(model, "")
    return found


def plain_copy(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a module of a backbone without any trace of tasks: plain classes, plain weights and no parts.

    Args:
        module: the backbone, or a module of it.
        memo: as ``copy.deepcopy`` takes it: copies that exist already, by the id of the original.
    """
    memo = {} if memo is None else memo
    # deepcopy does not copy what the memo has already
    for inner in own_modules(module).values():
        ours = (inner._modules.get(CHILD), *(inner.__dict__.get(name) for name in (LEAN, REGISTRY, ENTERED)))
        memo |= {id(each): None for each in ours if each is not None}
        for parameter in inner._parameters.values():
            if isinstance(parameter, Compact) and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(parameter.stored.exact(), requires_grad=False)
    copied = copy.deepcopy(module, memo)
    for inner in copied.modules():
        inner._modules.pop(CHILD, None)
        unfreeze(inner)
    copied.__dict__.pop(REGISTRY, None)
    return copied
