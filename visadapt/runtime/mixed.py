"""Mixed batches at one module: every sample with the parts of its own task, in one pass of the backbone.

A host runs once over the whole batch wherever the tasks only add to it. Parts that know how to act for many tasks at
once (a class with ``stacked``) do so by one batched product; all others act group by group, each on its own samples, so
that train-mode statistics see their own task's samples only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.batch import Key
from visadapt.backbone.modules import REGISTRY
from visadapt.backbone.rows import Fact
from visadapt.backbone.tracing import is_tracing
from visadapt.errors import VisadaptError
from visadapt.methods.stacking import Rows
from visadapt.runtime.division import Division, UnfitError
from visadapt.runtime.door import enter
from visadapt.runtime.mixed_norms import stack_norms
from visadapt.runtime.registry import Mixed, Parts
from visadapt.runtime.roles import AROUND, around, core, role, run

NONE = nn.ModuleDict()
"""The parts of the bare backbone."""


class Groups:
    """Which task's parts act on which rows at one host.

    Args:
        host: the module.
        parts: what it carries.
        tasks: one per sample, None for the bare backbone.
    """

    def __init__(self, host: nn.Module, parts: Parts, tasks: tuple[str | None, ...]) -> None:
        # tasks without parts here are one group, with the bare backbone
        here = {task: task if task is not None and task in parts else None for task in tasks}
        names = {name: number for number, name in enumerate(dict.fromkeys(here.values()))}
        self.parts = [NONE if name is None else parts[name] for name in names]
        if len(names) == 1:
            return
        self.division = Division(tuple([names[here[task]] for task in tasks]), parts._path or type(host).__name__)
        self._registry = parts._registry
        self._tasks = tasks
        # what a host without children runs asks for no task, but for the weights that it computes with
        asks = any(role(part) == "weights" for own in self.parts for part in own.values())
        self._leaf = len(host._modules) == 1 and not asks
        known = self._facts(parts._path)
        self.inputs: dict[Key, Fact] = known.inputs
        self.outputs: dict[Key, Fact] = known.outputs

    def _facts(self, path: str) -> Any:
        """What is known of the rows here: of this batch, or (in a graph being made) of all batches."""
        place = self.division.place
        if isinstance(self._tasks, Mixed):
            known = self._tasks.rows.hosts.get(path)
            if known is None or not known.known:
                raise UnfitError(f"it is not known which rows belong to which sample at {place}")
            return known
        known = self._registry.facts.batches.hosts.get(path)
        if not (is_tracing() or torch._C._current_graph_task_id() != -1):
            raise outside(place)
        if known is None or not known.known:
            raise VisadaptError(
                f"it is not known which rows belong to which sample at {place}, and a graph cannot run one task at a "
                "time: call the model without torch.compile"
            )
        return known

    def rows(self, tensor: Tensor, fact: Fact | None) -> Rows:
        """Which rows of a tensor are which group's."""
        return self.division.rows(tensor.shape[0] if tensor.ndim else 0, tensor.device, fact)

    def apart(self, function: Callable[[nn.ModuleDict, Any, Any], Any], args: Any, kwargs: Any) -> Any:
        """Run ``function(parts, args, kwargs)`` for each group on its own rows and joins what it gives."""
        outs = []
        for group, parts in enumerate(self.parts):
            own_args, own_kwargs = self.division.share((args, kwargs), self.inputs, group)
            if self._leaf:
                outs.append(function(parts, own_args, own_kwargs))
                continue
            # what runs within sees the rows of one group only, and so their tasks only
            tasks = [self._tasks[i] for i in self.division.samples[group]]
            mixed = len(set(tasks)) > 1
            with self._registry.within(self._own(tasks) if mixed else tasks[0]):
                outs.append(function(parts, own_args, own_kwargs))
        return self.division.join(outs, self.outputs)

    def _own(self, tasks: list[str | None]) -> tuple[str | None, ...]:
        return Mixed.of(tasks, self._tasks.rows) if isinstance(self._tasks, Mixed) else tuple(tasks)


def outside(place: str) -> VisadaptError:
    """What is raised where a host is called without the whole model."""
    return VisadaptError(
        f"{place} was called outside of the model's own forward, where it is not known which rows belong to which "
        "sample: give a batch of mixed tasks to model(...) itself, or run one task at a time"
    )


def run_mixed(host: nn.Module, plain: type[nn.Module], parts: Parts, tasks: Any, args: Any, kwargs: Any) -> Any:
    """A host's forward for a batch of mixed tasks; see the module."""
    if REGISTRY in host.__dict__ and not isinstance(tasks, Mixed) and not is_tracing():
        return enter(host, parts._registry, tasks, args, kwargs)
    if isinstance(tasks, str):
        raise outside(parts._path)
    groups = Groups(host, parts, tasks)
    if len(groups.parts) == 1:
        return run(host, plain, groups.parts[0], args, kwargs)
    roles = {role(part) for group in groups.parts for part in group.values()}
    if "before" in roles:
        # each group with an input of its own: apart from the start
        return groups.apart(lambda group, a, k: run(host, plain, group, a, k), args, kwargs)
    if roles & {"instead", "weights"}:
        out = None
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            rows = groups.rows(args[0], groups.inputs.get((0, 0)))
            out = stack_norms(host, plain, groups.parts, rows, args[0])
        if out is None:
            out = groups.apart(lambda group, a, k: core(host, plain, group, a, k), args, kwargs)
    else:
        out = plain.forward(host, *args, **kwargs)
    acting = [[part for part in group.values() if role(part) in AROUND] for group in groups.parts]
    for step in range(max(map(len, acting))):
        own = {g: parts[step] for g, parts in enumerate(acting) if step < len(parts)}
        out = _around(groups, own, out, args[0] if args else None)
    return out


def _around(groups: Groups, acting: dict[int, nn.Module], out: Any, first: Any, key: Key = ()) -> Any:
    """One step of what acts on the host's output, one part per group."""
    if not isinstance(out, Tensor):
        return (_around(groups, acting, out[0], first, (0,)), *out[1:])
    rows = groups.rows(out, groups.outputs.get(key))
    for g, part in acting.items():
        if role(part) == "watch":
            part(rows.take(out, g))
    acting = {g: part for g, part in acting.items() if role(part) != "watch"}
    parts = list(acting.values())
    if not parts:
        return out
    beside = any(role(part) == "beside" for part in parts)
    given = groups.rows(first, groups.inputs.get((0, 0))) if beside else rows
    if len(parts) == rows.groups and _alike(parts):
        if beside:
            return out + type(parts[0]).stacked(parts, given, first)  # type: ignore[attr-defined]
        return type(parts[0]).stacked(parts, rows, out)  # type: ignore[attr-defined]
    return rows.put(
        out,
        {
            g: around(part, rows.take(out, g), (given.take(first, g),) if role(part) == "beside" else ())
            for g, part in acting.items()
        },
    )


def _alike(parts: list[nn.Module]) -> bool:
    """Whether parts can be stacked: of one class that knows how, with the same options and shapes."""
    if not hasattr(type(parts[0]), "stacked"):
        return False
    first = _looks(parts[0])
    return all(type(part) is type(parts[0]) and _looks(part) == first for part in parts[1:])


def _looks(part: nn.Module) -> list[Any]:
    """What two parts must share: classes, options and shapes, all the way down."""
    found: list[Any] = [type(part), *[(k, v) for k, v in part.__dict__.items() if k[0] != "_"]]
    found += [p.shape for p in part._parameters.values() if p is not None]
    for child in part._modules.values():
        if child is not None:
            found += _looks(child)
    return found
