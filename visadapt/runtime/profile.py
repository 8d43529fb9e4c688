"""Profiles: everything about a task's parts at every host except the values of their tensors.

Tasks of one profile differ in their tensors only, so one batched product acts for all of them. A task's profile is
found once, and found again only after its parts, their options or their mode changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from visadapt.backbone.subclass import plain_class
from visadapt.runtime.roles import AROUND, role

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its own."""
    return any(module.__dict__[name] for name in _HOOKS)


@dataclass(frozen=True)
class Step:
    """One part of a profile's tasks at one host.

    Attributes:
        name: of the part.
        role: how it acts; see `visadapt.runtime.roles.role`.
        looks: what tasks' parts share: classes, options and shapes.
        rowwise: whether it computes batches of mixed tasks at once, in the mode that it is in.
    """

    name: str
    role: str
    looks: Any
    rowwise: bool

    @staticmethod
    def of(name: str, part: nn.Module) -> Step:
        """The step of a part."""
        how = role(part)
        # a forward or hook of one module may change what it computes, or fetch weights from elsewhere
        given = any("forward" in module.__dict__ or has_hooks(module) for module in part.modules())
        rowwise = (
            how != "instead" and hasattr(type(part), "rowwise") and getattr(part, "is_rowwise", True) and not given
        )
        if rowwise or (how in AROUND and hasattr(type(part), "stacked") and not given):
            looks: list[Any] = _looks(part)
        elif how not in AROUND:
            # a norm of its own; the widths of heads may differ
            looks = (
                [id(part) if given else plain_class(part), part.training, getattr(part, "eps", None)]
                if name == "norm"
                else [how, plain_class(part)]
            )
        else:
            looks = [id(part)] if given else [type(part)]
        return Step(name, how, looks, rowwise)


class Profile:
    """What tasks share whose parts differ only in the values of their tensors.

    Attributes:
        steps: by path of the host, in the order in which they act.
        before: those of them that act on what the host is called with.
        around: those of them that act once the host's output is there.
        roles: of the steps, by path.
        shapes: of the tensors of each rowwise part, by path, name and the tensor's name.
        acts: the first profile with the same ``before`` and ``around``.
        examples: each rowwise part without values, by path and name.
    """

    def __init__(self, steps: dict[str, tuple[Step, ...]], parts: dict[str, nn.ModuleDict]) -> None:
        self.steps = steps
        self.acts = self
        self.before = {path: tuple(s for s in own if s.role == "before") for path, own in steps.items()}
        self.around = {path: tuple(s for s in own if s.role in AROUND) for path, own in steps.items()}
        self.roles = {path: frozenset(s.role for s in own) for path, own in steps.items()}
        self.shapes = {
            path: {s.name: {key: tuple(p.shape) for key, p in _tensors(parts[path][s.name])} for s in own if s.rowwise}
            for path, own in steps.items()
        }
        # one memo: a ladder's rungs and its side network pass each other tensors
        memo: dict[int, Any] = {}
        self.examples = {
            path: {s.name: _without_values(parts[path][s.name], memo) for s in own if s.rowwise}
            for path, own in steps.items()
        }


class Held:
    """The parts of one task, with its profile.

    Attributes:
        parts: by path of the host.
        hosts: the paths.
        profile: of the task.
        changes: of all tasks' modes that these parts had when they were last looked at.
    """

    def __init__(self, parts: dict[str, nn.ModuleDict], profiles: list[Profile]) -> None:
        self.parts = parts
        self.hosts = list(parts)
        steps = {path: tuple(Step.of(name, part) for name, part in own.items()) for path, own in parts.items()}
        found = next((known for known in profiles if known.steps == steps), None)
        if found is None:
            found = Profile(steps, parts)
            acts = (found.before, found.around)
            found.acts = next((known.acts for known in profiles if (known.before, known.around) == acts), found)
            profiles.append(found)
        self.profile = found
        self.changes = -1
        modules = [module for own in parts.values() for module in own.modules()]
        self._children = [module.__dict__["_modules"] for module in modules]
        self._were = [dict(children) for children in self._children]
        # not a tensor that a hook computes from parameters (torch's pruning and older weight norm): it has no one value
        options = [
            (module.__dict__, key)
            for module in modules
            for key, value in module.__dict__.items()
            if key[0] != "_" and not isinstance(value, Tensor)
        ]
        self._modules = [module.__dict__ for module in modules]
        self._hooks = [module.__dict__[name] for module in modules for name in _HOOKS]
        self._hooked = list(map(len, self._hooks))
        self._sizes = list(map(len, self._modules))
        self._dicts, self._keys = [d for d, _ in options], [key for _, key in options]
        self._values = [d[key] for d, key in options]

    def holds(self) -> bool:
        """Whether parts, options and modes have not changed since."""
        # in C, as a task may have hundreds of these
        if self._children != self._were or list(map(len, self._modules)) != self._sizes:
            return False
        if list(map(len, self._hooks)) != self._hooked:
            return False
        return list(map(dict.get, self._dicts, self._keys)) == self._values

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the task finds its own."""

    def __reduce__(self) -> Any:
        return type(None), ()


def _looks(part: nn.Module) -> list[Any]:
    """Classes, options and shapes, all the way down."""
    found: list[Any] = [
        type(part),
        *[(k, id(v) if isinstance(v, Tensor) else v) for k, v in part.__dict__.items() if k[0] != "_"],
    ]
    found += [(name, p.shape, p.dtype) for name, p in part._parameters.items() if p is not None]
    for child in part._modules.values():
        if child is not None:
            found += _looks(child)
    return found


def _without_values(part: nn.Module, memo: dict[int, Any]) -> nn.Module:
    for tensor in (*part.parameters(), *part.buffers()):
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(part, memo)


def _tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from part.named_parameters(remove_duplicate=False)
    yield from part.named_buffers(remove_duplicate=False)
