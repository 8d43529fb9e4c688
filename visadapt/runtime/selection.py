"""Choose the active task."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from visadapt.arguments import reading
from visadapt.backbone.modules import ENTERED, ModelT, ancestors, unwrapped
from visadapt.backbone.subclass import made_by, plain_class
from visadapt.errors import VisadaptError
from visadapt.printable import shown
from visadapt.runtime.blocks import generator_of
from visadapt.runtime.by_row import named
from visadapt.runtime.choice import AUTO
from visadapt.runtime.composition import composed
from visadapt.runtime.door import door_class
from visadapt.runtime.generation import generates, generating_class
from visadapt.runtime.host import dress
from visadapt.runtime.registry import Registry, find_registry, registry_of
from visadapt.runtime.task_modules import TaskModules


def activate(model: ModelT, task: str | Sequence[str | None] | None) -> ModelT:
    """Choose the active task, for every thread that has not chosen one with `using`.

    Args:
        model: an injected model.
        task: its name, None for the bare backbone, a list that names one for each sample of the batches
            to come, or ``"auto"`` for the decider's choice.

    Returns:
        The same model.

    Raises:
        VisadaptError: the model has no such task; the nearest is named.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> model = visadapt.inject(model, m=4, task="birds", num_classes=5)
        >>> visadapt.activate(model, "flowers")(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 3])
    """
    registry = registry_of(model)
    registry.choose(_checked(model, registry, task))
    registry.settle()
    return model


@contextmanager
def using(model: ModelT, task: str | Sequence[str | None] | None) -> Iterator[ModelT]:
    """Choose a task within a ``with`` block, for this thread (or async task) only.

    With a list, every sample of the batch has its own task: adapters, norms and head. Heads of different widths are
    padded with −inf; `visadapt.split` takes the logits apart again.

    With a list of several tasks and a batch of one sample, the output has one row per task. Everything before the first
    module at which a task acts runs once: with `visadapt.Ladder` and `visadapt.Linear` the whole backbone, with
    adapters in the last stage all earlier stages. If the first run shows that this is not possible (the tasks act from
    the start, or the model reads the batch size before that module), the sample is repeated for each task.

    A forward runs for the task that is chosen where it begins; so does what gradient checkpointing computes again in
    backward. A block in a generator counts while the generator runs. A thread that is started in the block has to
    choose for itself.

    Args:
        model: an injected model.
        task: its name, None for the bare backbone, a list that names one for each sample (or all that are to answer
            one sample), or ``"auto"``: the model's decider chooses for each sample (see `visadapt.fit_decider`).

    Yields:
        The same model.

    Raises:
        VisadaptError: the model has no such task (the nearest is named), or, in the forward, the batch has another
            length than the list, or cannot be divided into samples.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> model = visadapt.inject(model, m=4, task="birds", num_classes=5).eval()
        >>> images = torch.randn(3, 3, 32, 32)
        >>> with torch.no_grad(), visadapt.using(model, ["birds", "flowers", "birds"]):
        ...     logits = model(images)  # one task per sample, one pass of the backbone
        >>> {task: rows.shape for task, rows in visadapt.split(model, logits, ["birds", "flowers", "birds"]).items()}
        {'birds': torch.Size([2, 5]), 'flowers': torch.Size([1, 3])}
        >>> with torch.no_grad(), visadapt.using(model, ["birds", "flowers"]):
        ...     model(images[:1]).shape  # both tasks of one image
        torch.Size([2, 5])
    """
    registry = registry_of(model)
    with registry.only(_checked(model, registry, task), generator_of(sys._getframe(1))):
        yield model


def _checked(model: nn.Module, registry: Registry, task: Any) -> Any:
    if task is None or (isinstance(task, str) and task != AUTO):
        return None if task is None else registry.task(task).name
    try:
        whole = isinstance(task, Sequence) and bool(task)
    except Exception:  # of a stranger's class
        whole = False
    if not whole:
        raise VisadaptError(f"task must be a task's name, None, or a list with one name per sample, got {shown(task)}")
    if task == AUTO:
        if registry.decider is None:
            raise VisadaptError("'auto' needs a decider: visadapt.fit_decider makes one, load_decider reads one")
        names: Any = AUTO
    else:
        with reading("task"):
            own = [None if name is None else registry.task(name).name for name in task]
        names = named(registry, composed(registry, own))
    _open_door(model)
    return names


def _open_door(model: nn.Module) -> None:
    """Let a model take batches of mixed tasks, once it is asked for a list of tasks or for the decider's choice.

    Any module with hosts inside may take them: some models are called in steps (``forward_features``, ``encoder``).
    """
    backbone, registry = unwrapped(model), registry_of(model)
    if registry.doors is registry.hosts:
        return
    with registry.lock:
        hosts = registry.hosts
        for path in {outer for host in hosts for outer in ancestors(host) if outer} - hosts.keys():
            module = registry.facts.modules[path]
            if plain_class(module).forward is not nn.Module.forward:
                module.__dict__[ENTERED] = registry, path
                if door_class not in made_by(type(module)):
                    dress(module, door_class)
        _open_front(backbone)
        registry.doors = hosts


def _open_front(backbone: nn.Module) -> None:
    if door_class not in made_by(type(backbone)):
        dress(backbone, door_class)
        if generates(plain_class(backbone)):
            dress(backbone, generating_class)


def active(model: nn.Module) -> str | tuple[str | None, ...] | None:
    """The task that a forward in this thread would run; None for the bare backbone; a tuple for a mixed batch.

    Args:
        model: an injected model.

    Returns:
        The task's name; None for the bare backbone; a tuple with one name per sample for a mixed batch.

    Raises:
        VisadaptError: the model was never injected.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> visadapt.active(model)
        'flowers'
        >>> with visadapt.using(model, None):
        ...     print(visadapt.active(model))
        None
    """
    name: str | tuple[str | None, ...] | None = registry_of(model).in_use()
    return tuple(name) if isinstance(name, tuple) else name


@contextmanager
def bare(model: nn.Module, task: str | None = None) -> Iterator[None]:
    """Run the bare backbone, or a task, in eval mode, whatever is active; modes are restored at the end.

    Modes are changed only where a module is in train mode. All threads would see it, so forwards in others are refused
    meanwhile.

    Args:
        model: the model.
        task: name of a task of it; None for the bare backbone.

    Raises:
        VisadaptError: modes must change, and the model is kept for another thread.
    """
    registry = find_registry(model)
    with contextlib.ExitStack() as stack:
        if registry is not None:
            # first: a task's modules are among the model's while it is in use
            stack.enter_context(using(unwrapped(model), task))
        # the container of all tasks' modules is in the mode that the others follow
        modules = (module for module in model.modules() if not isinstance(module, TaskModules))
        trains = [module for module in modules if module.__dict__["training"]]
        if trains and registry is not None:
            stack.enter_context(registry.reservation.hold())
        stack.callback(_set_modes, trains, True)
        _set_modes(trains, False)
        yield


def _set_modes(modules: list[nn.Module], mode: bool) -> None:
    for module in modules:
        module.training = mode
