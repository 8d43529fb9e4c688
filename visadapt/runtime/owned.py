"""What a task owns beside adapters and norms, as its file records it, and what is trained that no task owns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from visadapt.backbone.fingerprint import backbone_tensors
from visadapt.backbone.heads import Final, Head, is_final
from visadapt.backbone.modules import ancestors, last_name, parent, within
from visadapt.errors import VisadaptError
from visadapt.runtime.registry import Registry, Task
from visadapt.typed import fits


def described(task: Task, tensors: Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The entries of a task's file that say which modules it owns, as JSON values.

    Args:
        task: the task.
        tensors: names of its tensors, which already show where its head is, unless its final layers are not the last.
        modules: the backbone's modules by path.
    """
    entries: dict[str, Any] = {}
    if task.head_at is not None and task.head_at != _by_names(tensors, modules):
        finals = [[final.path, final.times, final.plus] for final in task.head_at.finals]
        entries["head_at"] = {"modules": list(task.head_at.modules), "finals": finals}
    return entries | ({"also": list(task.also)} if task.also else {})


def take_up(
    task: Task, description: Mapping[str, Any], tensors: Iterable[str], modules: Mapping[str, nn.Module]
) -> None:
    """Set a task's head and the other modules that it owns, as its file records them.

    Args:
        task: with its policies.
        description: of the file.
        tensors: names of the file's tensors.
        modules: the backbone's modules by path.

    Raises:
        VisadaptError: the entries are not of their form.
    """
    also, entry = description.get("also", []), description.get("head_at")
    if not fits(also, list[str]):
        raise VisadaptError(f"also must be a list of paths, got {also!r}")
    task.also = tuple(also)
    if task.head != "frozen":
        task.head_at = _by_names(tensors, modules) if entry is None else _read(entry)


def check_owned(task: Task, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
    """Refuse a task that owns modules that a backbone does not have, before memory is taken for its own.

    Args:
        task: as its file describes it.
        tensors: of the file.
        modules: the backbone's modules by path.

    Raises:
        VisadaptError: the module does not exist, it is not a layer that gives logits, or the file's tensor for such a
            layer is not as wide as the number of classes makes it.
    """
    if task.head_at is not None and not task.head_at.modules:
        raise VisadaptError(f"task {task.name!r} has a head of its own, and this model has no place for it")
    for path in task.owned:
        if not path or path not in modules:
            raise VisadaptError(f"task {task.name!r} has its own {path or 'root'}, and this model has no such module")
    for final in task.head_at.finals if task.head_at is not None else ():
        root = next((path for path in task.owned if within(final.path, [path])), None)
        if root is None or not is_final(modules.get(final.path)):
            raise VisadaptError(f"task {task.name!r} has logits from {final.path}, which is not a layer of its head")
        name = f"{root}.head{final.path.removeprefix(root)}.weight"
        shape = tuple(tensors[name].shape) if name in tensors else ()
        width = final.width(task.num_classes or 0)
        if task.head == "new" and shape and shape[0] != width:
            raise VisadaptError(f"{name} is {shape}, expected {(width, *shape[1:])}")


def _read(entry: Any) -> Head:
    if not fits(entry, dict[str, list[Any]]) or not fits(entry.get("modules"), list[str]) or "finals" not in entry:
        raise VisadaptError("head_at must have modules and finals")
    for final in entry["finals"]:
        if not fits(final, list[Any]) or len(final) != 3 or not fits(final[0], str) or not fits(final[1:], list[int]):
            raise VisadaptError(f"head_at: a final must be a path and two integers, got {final!r:.60}")
        if final[1] < 1 or final[2] < 0:
            raise VisadaptError(f"head_at: a final must have outputs per class, got {final!r:.60}")
    return Head(tuple(entry["modules"]), tuple(Final(*final) for final in entry["finals"]))


def _by_names(tensors: Iterable[str], modules: Mapping[str, nn.Module]) -> Head:
    """Where a head is by the names of its tensors, ``path.head.tensor``; its last layers are the logits'.

    These are the modules themselves, where they are layers, or else the last layer inside them.
    """
    paths: dict[str, None] = {}
    for name in (name for name in tensors if ".head." in name):
        # the name ends in a tensor of the head, not in a head
        hosts = [parent(path) for path in ancestors(name) if last_name(path) == "head" and parent(path)]
        paths |= dict.fromkeys([host for host in hosts if host in modules][-1:])
    finals = [path for path in paths if is_final(modules[path])]
    inside = [path for path, module in modules.items() if within(path, tuple(paths)) and is_final(module)]
    return Head(tuple(paths), tuple(map(Final, finals or inside[-1:])))


def check_nothing_else_trained(model: nn.Module, registry: Registry, task: str) -> None:
    """Refuse to save while modules are trained that no task owns: the file would lack them.

    Inject freezes the whole backbone. A parameter that requires a gradient now, and is new, has changed, or has a
    gradient, was put in or unfrozen by the user to be trained.

    Args:
        model: the backbone.
        registry: of its tasks.
        task: that is to be saved.

    Raises:
        VisadaptError: there are such parameters; their modules and the remedy are named.
    """
    tensors = backbone_tensors(model)
    trained = [
        name
        for name, tensor in tensors.items()
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad and registry.versions.moved(name, tensor)
    ]
    if trained:
        closed = [name for name, t in tensors.items() if isinstance(t, nn.Parameter) and not t.requires_grad]
        loose = [name for name in trained if "." not in name]
        if loose:
            raise VisadaptError(
                f"put in or unfrozen after inject, and trained: {loose[0]}, a parameter of the model itself, which the "
                f"file of task {task!r} would leave out. Put it into a module of its own before inject, and let the "
                "task own that by train_also=, or call requires_grad_(False) on it if it now belongs to the backbone"
            )
        paths = list(dict.fromkeys(_outermost(name, closed) for name in trained))
        shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
        raise VisadaptError(
            f"replaced or unfrozen after inject, and trained: {shown}; the file of task {task!r} would leave that out. "
            f"Let a task own it by inject(model, task='another', train_also={paths}) on the model as it is now, or "
            "call requires_grad_(False) on it if it now belongs to the backbone"
        )


def _outermost(name: str, closed: Iterable[str]) -> str:
    """The largest module around a parameter in which no parameter is frozen."""
    around = ancestors(name)[1:]
    return next((path for path in around if not any(within(other, [path]) for other in closed)), parent(name))
