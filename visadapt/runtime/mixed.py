"""Mixed batches: every sample with the task of its own, in one pass of the backbone.

A host runs once over the whole batch wherever the tasks only add to it. Parts that know how to act for many tasks at
once (a class with ``stacked``) do so by one batched product; all others act group by group, each on its own samples, so
that train-mode statistics see their own task's samples only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from visadapt.backbone.heads import width_of
from visadapt.errors import VisadaptError
from visadapt.methods.stacking import Rows, rows_for
from visadapt.runtime.mixed_norms import stack_norms
from visadapt.runtime.registry import _USING, Parts, facts_of, registry_of
from visadapt.runtime.roles import around, core, role, run

NONE = nn.ModuleDict()
"""The parts of the bare backbone."""


class Groups:
    """Which task's parts act on which rows at one host.

    Args:
        host: the module.
        parts: what it carries.
        tasks: one a sample, None for the bare backbone.
        first: the host's input; its rows are a multiple of the samples where a backbone cuts each into windows.

    Raises:
        VisadaptError: the input's rows are not the samples'.
    """

    def __init__(self, host: nn.Module, parts: Parts, tasks: tuple[str | None, ...], first: Tensor) -> None:
        self.size = first.shape[0] if first.ndim else 0
        repeat, rest = divmod(self.size, len(tasks))
        if rest or not repeat:
            raise VisadaptError(
                f"{type(host).__name__} was called with {self.size} rows for {len(tasks)} tasks: give one task a sample"
            )
        # tasks without parts here are one group, with the bare backbone
        here = {task: task if task is not None and task in parts._modules else None for task in tasks}
        names = {name: number for number, name in enumerate(dict.fromkeys(here.values()))}
        self.parts = [NONE if name is None else cast("nn.ModuleDict", parts._modules[name]) for name in names]
        number = tuple([names[here[task]] for task in tasks])
        self.rows: Rows = rows_for(number, repeat, first.device)
        self._registry = parts._registry
        self._tasks = tasks
        # what a host without children runs asks for no task
        self._leaf = len(host._modules) == 1

    def apart(self, function: Callable[[nn.ModuleDict, Any, Any], Any], args: Any, kwargs: Any) -> Any:
        """Runs ``function(parts, args, kwargs)`` for each group on its own rows and joins what it gives."""
        outs = []
        for group, parts in enumerate(self.parts):
            mine = tuple([self._take(a, group) for a in args]), {k: self._take(v, group) for k, v in kwargs.items()}
            with self._alone(group):
                outs.append(function(parts, *mine))
        return self._join(outs)

    @contextmanager
    def _alone(self, group: int) -> Iterator[None]:
        """What runs within sees the rows of one group only, and so their tasks only."""
        if self._leaf:
            yield
            return
        tasks = tuple([t for t, number in zip(self._tasks, self.rows.number, strict=True) if number == group])
        token = _USING.set({**(_USING.get() or {}), id(self._registry): tasks})
        try:
            yield
        finally:
            _USING.reset(token)

    def _take(self, value: Any, group: int) -> Any:
        """One group's share of an argument: every tensor with a row a sample is cut to the group's rows."""
        rowed = isinstance(value, Tensor) and value.ndim and value.shape[0] == self.size
        return self.rows.take(value, group) if rowed else value

    def _join(self, outs: list[Any]) -> Any:
        """Puts the groups' outputs together again; narrower ones are padded with −inf, as logits want it."""
        if isinstance(outs[0], tuple):
            return tuple(self._join(list(each)) for each in zip(*outs, strict=True))
        if isinstance(outs[0], Mapping):
            # transformers' outputs
            return type(outs[0])(**{key: self._join([out[key] for out in outs]) for key in outs[0]})
        if not isinstance(outs[0], Tensor):
            return outs[0]
        if outs[0].ndim == 0:
            # a loss: each group's is the mean over its rows
            return sum(out * size for out, size in zip(outs, self.rows.sizes, strict=True)) / self.size
        widest = max(out.shape[-1] for out in outs)
        padded = [nn.functional.pad(out, (0, widest - out.shape[-1]), value=-torch.inf) for out in outs]
        return self.rows.join(padded if any(out.shape[-1] < widest for out in outs) else outs)


def run_mixed(
    host: nn.Module, plain: type[nn.Module], parts: Parts, tasks: tuple[str | None, ...], args: Any, kwargs: Any
) -> Any:
    """A host's forward for a batch of mixed tasks; see the module."""
    first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    if first is None:
        raise VisadaptError(
            f"{type(host).__name__} was called without a tensor: a mixed batch cannot be told apart there"
        )
    groups = Groups(host, parts, tasks, first)
    if len(groups.parts) == 1:
        return run(host, plain, groups.parts[0], args, kwargs)
    roles = {role(part) for group in groups.parts for part in group.values()}
    if "before" in roles:
        # each group with an input of its own: apart from the start
        return groups.apart(lambda group, a, k: run(host, plain, group, a, k), args, kwargs)
    if roles & {"instead", "weights"}:
        out = stack_norms(host, plain, groups.parts, groups.rows, first) if len(args) == 1 and not kwargs else None
        if out is None:
            out = groups.apart(lambda group, a, k: core(host, plain, group, a, k), args, kwargs)
    else:
        out = plain.forward(host, *args, **kwargs)
    acting = [[part for part in group.values() if role(part) in ("beside", "after")] for group in groups.parts]
    for step in range(max(map(len, acting))):
        out = _around(groups.rows, {g: own[step] for g, own in enumerate(acting) if step < len(own)}, out, first)
    return out


def _around(rows: Rows, acting: dict[int, nn.Module], out: Any, first: Tensor) -> Any:
    """One step of what acts on the host's output, one part a group."""
    if not isinstance(out, Tensor):
        return (_around(rows, acting, out[0], first), *out[1:])
    parts = list(acting.values())
    if len(parts) == rows.groups and _alike(parts):
        if role(parts[0]) == "beside":
            return out + type(parts[0]).stacked(parts, rows, first)  # type: ignore[attr-defined]
        return type(parts[0]).stacked(parts, rows, out)  # type: ignore[attr-defined]
    return rows.put(out, {g: around(part, rows.take(out, g), (rows.take(first, g),)) for g, part in acting.items()})


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


def split(model: nn.Module, logits: Tensor, tasks: Sequence[str | None]) -> dict[str | None, Tensor]:
    """Splits the logits of a mixed batch by task, each to the width of its own head.

    Args:
        model: the injected model.
        logits: ``(N, K)``, where K is the width of the widest head; narrower ones are padded with −inf.
        tasks: the task of each sample, as given to :func:`visadapt.using`.

    Returns:
        Task → ``(n, k)``: the rows of its samples, in the batch's order.

    Raises:
        VisadaptError: a task is unknown, or there are not as many tasks as rows.

    Example:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> model = visadapt.inject(model, m=4, task="birds", num_classes=5).eval()
        >>> names = ["birds", "flowers", "birds"]
        >>> with torch.no_grad(), visadapt.using(model, names):
        ...     logits = model(torch.randn(3, 3, 32, 32))
        >>> logits.shape, visadapt.split(model, logits, names)["flowers"].shape
        (torch.Size([3, 5]), torch.Size([1, 3]))
    """
    registry = registry_of(model)
    if len(tasks) != logits.shape[0]:
        raise VisadaptError(f"{len(tasks)} tasks for {logits.shape[0]} rows of logits")
    facts = facts_of(model)
    own = None if facts.head is None else width_of(facts.modules[facts.head.final])
    found = {}
    for name in dict.fromkeys(tasks):
        width = None if name is None else registry.task(name).num_classes
        rows = [i for i, task in enumerate(tasks) if task == name]
        # a task without a head of its own answers by the backbone's
        found[name] = logits[rows, : own if width is None else width]
    return found
