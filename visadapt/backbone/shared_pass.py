"""Many tasks of one sample: whether all that lies below the first adapter can run once, for that sample alone.

A copy of the backbone shows it. It runs on the sample as it is, with the tensor at the first adapter changed, and with
both tensors as two rows from there on. If the last run gives what the others give, and every later adapter sees two
samples, then one pass serves any number of tasks. A model that reuses the batch size from before that place fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.batch import ITEMS, Axis, Key, is_opaque, leaves, mapped, take
from visadapt.backbone.modules import own_modules, unwrapped
from visadapt.backbone.rows import Lying, Print, RowFacts
from visadapt.backbone.twin import examining, twin_of

_ON_OUTPUT = frozenset({"after", "watch"})


@dataclass(frozen=True)
class SharedPass:
    """Where one sample becomes one row per task.

    Attributes:
        place: the first module at which a task acts.
        at_input: whether the module itself runs for all rows, or what follows it.
        single: paths of the modules with parts that see the one sample.
    """

    place: str
    at_input: bool
    single: frozenset[str]


def repeated(given: Any, cut: Mapping[Key, Axis], count: int, views: bool = False) -> Any:
    """A batch of one sample as one of ``count`` equal samples.

    Args:
        given: the batch.
        cut: where its sample lies; see `visadapt.backbone.batch.take`.
        count: number of samples.
        views: whether tensors may share the sample's memory.
    """
    if not views or any(not isinstance(leaf, Tensor) for key, leaf in leaves(given) if key in cut):
        return take(given, cut, [0] * count)
    if ITEMS in cut.values():
        return take(given, cut, [0] * count)

    def expanded(key: Key, leaf: Any) -> Any:
        axis = cut.get(key)
        if not isinstance(axis, int):
            return leaf
        return leaf.expand([count if i == axis else size for i, size in enumerate(leaf.shape)])

    return mapped(expanded, given)


def spread(tree: Any, facts: Mapping[Key, Any], count: int) -> Any:
    """Repeat a module's arguments or output for one sample, as for ``count`` equal ones; views where possible.

    Args:
        tree: arguments or output of the module.
        facts: how samples lie in its tensors, along the first axis or not at all.
        count: number of samples.
    """

    def each(key: Key, leaf: Any) -> Any:
        fact = facts.get(key)
        return joined([leaf] * count, fact) if isinstance(leaf, Tensor) and isinstance(fact, Lying) else leaf

    return mapped(each, tree)


def joined(rows: list[Tensor], fact: Lying) -> Tensor:
    """Join the rows of several samples, in the order of the module's rows."""
    first = rows[0]
    if len(first) == 1 and all(tensor is first for tensor in rows):
        return first.expand(len(rows), *first.shape[1:])
    return torch.stack(rows, 1).flatten(0, 1) if fact.tiled else torch.cat(rows)


def find_shared(
    model: nn.Module, given: Any, facts: RowFacts, roles: Mapping[str, frozenset[str]]
) -> SharedPass | None:
    """Find out where tasks of one sample begin to differ, and whether they can part there.

    Args:
        model: the backbone, injected or not; neither it nor the batch is changed.
        given: ``(args, kwargs)`` with one sample.
        facts: of batches of this kind.
        roles: how tasks' parts act, by path of the module (see `visadapt.runtime.roles`).

    Returns:
        None if the batch has to be repeated for all tasks from the start.
    """
    try:
        return _examined(model, given, facts, roles)
    except Exception:  # a model may raise anything if the number of rows changes midway
        return None


class _Run:
    """One forward of the copy, with another tensor at one place."""

    def __init__(self, model: nn.Module, given: Any, paths: Mapping[str, frozenset[str]]) -> None:
        self.events: list[tuple[str, str]] = []
        self.rows: dict[str, int] = {}
        self._paths = paths
        self._twin = twin_of(unwrapped(model))
        self._given = given

    def __call__(self, place: str, at_input: bool, change: Callable[[Any], Any]) -> Any:
        modules = own_modules(self._twin)
        for path in self._paths:
            if path in modules:
                changed = change if path == place else None
                module = modules[path]
                module.forward = self._around(path, module.forward, changed, at_input)  # type: ignore[method-assign]
        args, kwargs = mapped(lambda _, leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self._given)
        with examining(self._twin):
            return self._twin(*args, **kwargs)

    def _around(self, path: str, forward: Any, change: Callable[[Any], Any] | None, at_input: bool) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.events.append((path, "input"))
            if change is not None and at_input:
                args, kwargs = change((args, kwargs))
            out = forward(*args, **kwargs)
            if change is not None and not at_input:
                out = change(out)
            self.events.append((path, "output"))
            first = next((leaf for _, leaf in leaves(out) if isinstance(leaf, Tensor)), None)
            self.rows[path] = len(first) if first is not None and first.ndim else 0
            return out

        return recorded


def _examined(model: nn.Module, given: Any, facts: RowFacts, roles: Mapping[str, frozenset[str]]) -> SharedPass | None:
    acting = {path: how for path, how in roles.items() if not how <= {"watch"}}
    plain = _Run(model, given, roles)
    out = plain("", False, lambda tree: tree)
    calls = [path for path, event in plain.events if event == "output"]
    if any(calls.count(path) != 1 for path in acting) or any(calls.count(path) > 1 for path in roles):
        return None
    begins = [
        (path, event == "input")
        for path, event in plain.events
        if path in acting and (event == "output") == (acting[path] <= _ON_OUTPUT)
    ]
    place, at_input = begins[0]
    known = facts.hosts[place].inputs if at_input else facts.hosts[place].outputs

    def other(tree: Any) -> Any:
        return mapped(lambda key, leaf: _other(leaf) if isinstance(known.get(key), Lying) else leaf, tree)

    def both(tree: Any) -> Any:
        return mapped(
            lambda key, leaf: joined([leaf, _other(leaf)], known[key]) if isinstance(known.get(key), Lying) else leaf,  # type: ignore[arg-type]
            tree,
        )

    changed = _Run(model, given, roles)(place, at_input, other)
    run = _Run(model, given, roles)
    if not _is_joint(run(place, at_input, both), out, changed, facts):
        return None
    single = frozenset(path for path in run.rows if run.rows[path] == plain.rows[path])
    doubled = {path for path in run.rows if run.rows[path] == 2 * plain.rows[path]}
    if not run.rows.keys() <= single | doubled or not acting.keys() - {place} <= doubled:
        return None
    return SharedPass(place, at_input, single - {place})


def _other(leaf: Any) -> Any:
    """Add noise to a tensor of floats; for integers no other value is known to be valid."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    noise = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0)).to(leaf)
    return leaf + noise * (leaf.std(correction=0) + 1e-3)


def _is_joint(two: Any, one: Any, other: Any, facts: RowFacts) -> bool:
    """Whether an output for two rows joins the outputs for each, and these differ."""
    evidence = False
    found = [dict(leaves(tree)) for tree in (two, one, other)]
    if not found[0].keys() == found[1].keys() == found[2].keys():
        return False
    for key, leaf in found[0].items():
        if is_opaque(leaf):
            return False  # a cache of the one sample
        if not isinstance(leaf, Tensor):
            continue
        fact = facts.outputs.get(key)
        if not isinstance(fact, Lying) or fact.axis == ITEMS:
            return False
        rows, *each = [tree[key].movedim(int(fact.axis), 0) for tree in found]
        expected = Print.of(joined(each, fact))
        got = Print.of(rows)
        if got.shape != expected.shape:
            return False
        scale = float(expected.rows.abs().max())
        if float((got.rows - expected.rows).abs().max()) > expected.tolerance * scale:
            return False
        left, right = (Print.of(tensor).rows for tensor in each)
        evidence = evidence or float((left - right).abs().max()) > 4 * expected.tolerance * scale
    return evidence
