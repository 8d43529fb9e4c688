"""The parameters that a task trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from torch import nn

from visadapt.arguments import reading
from visadapt.backbone.modules import CHILD
from visadapt.backbone.structure import STRUCTURE
from visadapt.runtime.registry import Parts, check_hosts, prefix_of, registry_of
from visadapt.runtime.selection import active


def named_parameters(model: nn.Module, task: str) -> Iterator[tuple[str, nn.Parameter]]:
    """A task's parameters by name (``host.part.tensor``, as in its file), for optimisers with groups.

    Args:
        model: an injected model.
        task: name of the task.

    Returns:
        Pairs of name and parameter, in the order of the task's file.

    Raises:
        VisadaptError: the model has no such task, or a module that holds its parts was replaced.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> dict(visadapt.named_parameters(model, "flowers"))["fc.head.weight"].shape
        torch.Size([3, 32])
    """
    check_hosts(model, task)
    registry_of(model).ask(task)
    seen: set[nn.Parameter] = set()
    for path, parts in registry_of(model).parts(task).items():
        for name, part in parts.items():
            for inner, parameter in part.named_parameters():
                # weights that are tied stand at several modules
                if parameter not in seen:
                    yield prefix_of(path, name, part) + inner, parameter
                seen.add(parameter)


def parameters(model: nn.Module, task: str | None = None) -> list[nn.Parameter]:
    """A task's parameters, for the optimiser: adapters, norm copies and head, nothing of the backbone.

    Args:
        model: an injected model.
        task: its name; None for the active one.

    Returns:
        The parameters, each once.

    Raises:
        VisadaptError: the model has no such task, or none is active.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> optimizer = torch.optim.AdamW(visadapt.parameters(model, "flowers"), lr=1e-3)
        >>> sum(p.numel() for p in visadapt.parameters(model)) == visadapt.summary(model)["flowers"].trained
        True
    """
    return [parameter for _, parameter in named_parameters(model, active(model) if task is None else task)]  # type: ignore[arg-type]


def trainable(model: nn.Module, task: str | Sequence[str]) -> nn.Module:
    """Let gradients flow to these tasks only, as DDP needs: it refuses parameters that a step does not use.

    Args:
        model: an injected model.
        task: a name, or several for a training batch of mixed tasks.

    Returns:
        The same model.

    Raises:
        VisadaptError: the model has no such task.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> model = visadapt.inject(model, m=4, task="birds", num_classes=5)
        >>> model = visadapt.trainable(model, "birds")
        >>> [all(p.requires_grad for p in visadapt.parameters(model, task)) for task in ("flowers", "birds")]
        [False, True]
    """
    registry = registry_of(model)
    several = isinstance(task, Sequence) and not isinstance(task, str)
    with reading("task"):
        wanted = {registry.task(name).name for name in (task if several else [task])}
    with STRUCTURE:
        for host in registry.hosts.values():
            cast("Parts", host._modules[CHILD])._let_flow(frozenset(wanted))
        registry.train_only(wanted)
        for name in registry.listed():
            # the parts of a task that is in use may be held by an optimiser
            registry.parts(name)
    return model
