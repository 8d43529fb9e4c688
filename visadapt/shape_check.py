"""Compare the description of a task file with its tensors, before memory is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import cast

import torch
from torch import Tensor, nn

from visadapt.backbone.facts import Facts
from visadapt.backbone.modules import within
from visadapt.backbone.site import Sites
from visadapt.errors import VisadaptError
from visadapt.methods.method import Method
from visadapt.runtime.registry import Task, prefix_of


def check_shapes(
    facts: Facts, task: Task, placements: Sequence[tuple[Method, Sites]], tensors: Mapping[str, Tensor]
) -> list[list[tuple[str, nn.Module]]]:
    """Refuse a task whose parts are not those that its file has tensors for.

    Adapters are built on the meta device, and each is compared before the next is built: a description takes no memory,
    and no more time than the file has tensors. Copies of the backbone's modules are compared by their number of values.

    Args:
        facts: of the backbone.
        task: with its policies, its head and what else it owns.
        placements: each method with its sites.
        tensors: of the file.

    Returns:
        For each placement the adapters as they were built, on the meta device, each with its host's path.

    Raises:
        VisadaptError: a part is described twice, cannot be built, or has no tensor of its name and shape in the file.
    """
    _check_copies(facts, task, tensors)
    taken: set[tuple[str | None, str]] = set()
    # tied weights stand in several parts, and in the file under the first one's name; kept: ids stay unique
    seen: dict[int, Tensor] = {}

    def take(path: str | None, part: str) -> None:
        if (path, part) in taken:
            raise VisadaptError(f"{part}{'' if path is None else f' at {path}'} is described twice")
        taken.add((path, part))

    built: list[list[tuple[str, nn.Module]]] = []
    for method, sites in placements:
        if not sites:
            take(None, method.part)
        built.append([])
        try:
            with torch.device("meta"):
                for path, part in method.parts(facts, sites, task):
                    take(path, method.part)
                    _check_part(prefix_of(path, method.part, part), part, tensors, seen)
                    built[-1].append((path, part))
        except VisadaptError:
            raise
        # torch's errors for sizes that no tensor can have
        except (RuntimeError, ArithmeticError, TypeError, ValueError) as error:
            raise VisadaptError(f"{method!s:.200} cannot be built at its sites: {error}") from error
    return built


def _check_part(prefix: str, part: nn.Module, tensors: Mapping[str, Tensor], seen: dict[int, Tensor]) -> None:
    for name, expected in part.state_dict(prefix=prefix, keep_vars=True).items():
        if id(expected) not in seen:
            seen[id(expected)] = expected
            check_tensor(name, expected, tensors)


def check_tensor(name: str, expected: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a tensor that is missing, or of another shape or kind of number.

    Args:
        name: of the tensor.
        expected: of the shape and of a dtype of the kind that it must have.
        tensors: by name.

    Raises:
        VisadaptError: there is no such tensor, or it is of another shape or kind.
    """
    if name not in tensors:
        raise VisadaptError(f"it lacks {name}")
    found = tensors[name]
    if found.shape != expected.shape:
        raise VisadaptError(f"{name} is {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if _kind(found) != _kind(expected):
        raise VisadaptError(f"{name} is {found.dtype}, expected {expected.dtype}")


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        # torch computes with these; the smaller ones are formats of storage
        return "float" if tensor.element_size() > 1 else str(tensor.dtype)
    return "complex" if tensor.is_complex() else str(tensor.dtype)


def _check_copies(facts: Facts, task: Task, tensors: Mapping[str, Tensor]) -> None:
    """Refuse copies that overlap, or have more values than the file."""
    for one, other in combinations(task.owned, 2):
        if within(one, [other]) or within(other, [one]):
            raise VisadaptError(f"task {task.name!r} has its own {one} and its own {other}: one lies in the other")
    finals = {final.path: final for final in task.head_at.finals} if task.head_at and task.head == "new" else {}
    for path in task.owned:
        part = "also" if path in task.also else "head"
        there = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(f"{path}.{part}."))
        copied = [own for inner, own in facts.modules.items() if within(inner, [path]) and not within(inner, finals)]
        parameters = {p for own in copied for p in own._parameters.values() if p is not None}
        needed = sum(p.numel() for p in parameters if p.is_floating_point())
        if there < needed:
            raise VisadaptError(f"{path} has {needed:,} values, and the file has {there:,} for it")
    for path, final in finals.items():
        root = next(root for root in task.owned if within(path, [root]))
        name = f"{root}.head{path.removeprefix(root)}.weight"
        shape = (final.width(task.num_classes or 0), *cast("Tensor", facts.modules[path].weight).shape[1:])
        if name not in tensors:
            raise VisadaptError(f"it lacks {name}")
        if tensors[name].shape != shape:
            raise VisadaptError(f"{name} is {tuple(tensors[name].shape)}, expected {shape}")
