"""The model's forward for a batch of mixed tasks: one pass over the whole batch, or one pass per task.

Before the first batch of a kind runs, the rows of each sample are found at every module (see `visadapt.backbone.rows`).
If they are known at every module where the batch's tasks differ, the backbone runs once over the whole batch.
Otherwise it runs one task at a time on that task's samples and the outputs are joined: slower, but always exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.batch import is_cache, leaves
from visadapt.backbone.heads import width_of
from visadapt.backbone.modules import CHILD, REGISTRY
from visadapt.backbone.rows import RowFacts
from visadapt.backbone.shared_pass import repeated
from visadapt.backbone.subclass import ModuleClass, cached, subclass
from visadapt.backbone.tracing import is_tracing
from visadapt.errors import VisadaptError
from visadapt.runtime.choice import AUTO
from visadapt.runtime.composition import Composition, composed
from visadapt.runtime.division import Division, UnfitError
from visadapt.runtime.registry import Mixed, Parts, Registry
from visadapt.runtime.weights import changes


class CacheError(VisadaptError):
    """A key-value cache was passed with a mixed batch that runs one task at a time; tasks cannot share one."""


@cached
def door_class(plain: ModuleClass) -> ModuleClass:
    """Return a subclass of the root module's class whose forward accepts batches of mixed tasks."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        registry: Registry | None = self.__dict__.get(REGISTRY)
        tasks = None if registry is None else registry.current()
        if registry is None or not is_outside(tasks):
            return plain.forward(self, *args, **kwargs)
        if not READS_CONTEXT and torch.compiler.is_dynamo_compiling():
            return _uncompiled(self, registry, tasks, args, kwargs)
        if is_tracing():
            check_compiled(self, registry, tasks, args, kwargs)
            return plain.forward(self, *args, **kwargs)
        return enter(self, registry, tasks, args, kwargs)

    forward.__wrapped__ = plain.forward  # type: ignore[attr-defined]
    return subclass(plain, door_class, forward=forward)


def is_outside(tasks: Any) -> bool:
    """Return whether several tasks or "auto" are active and the batch has not been examined yet."""
    return tasks == AUTO or (isinstance(tasks, tuple) and not isinstance(tasks, Mixed))


def enter(model: nn.Module, registry: Registry, tasks: Any, args: Any, kwargs: Any) -> Any:
    """Run the model on a batch of mixed tasks.

    Args:
        model: the injected model.
        registry: its registry.
        tasks: one task per sample, or ``"auto"``.
        args: positional arguments of the forward.
        kwargs: keyword arguments of the forward.

    Raises:
        VisadaptError: the number of tasks is not the number of samples; samples depend on each other; the batch cannot
            be split or the outputs cannot be joined.
    """
    if tasks == AUTO:
        tasks = tuple(registry.decider.choose(model, kwargs if kwargs and not args else args))
        registry.note_forward((name, None) for name in tasks)
    distinct = tuple(dict.fromkeys(tasks))
    batches = registry.facts.batches
    training = bool(model.__dict__["training"])
    head = registry.facts.head
    classes = None if head is None else width_of(registry.facts.modules[head.final])
    one = batches.single(model, (args, kwargs), len(tasks), classes)
    if one is not None:
        return _for_all(model, registry, tasks, (args, kwargs), one, classes)
    facts = batches.facts(model, (args, kwargs), len(tasks), len(distinct) > 1, classes)
    if len(distinct) == 1:
        with registry.within(distinct[0]):
            return model.forward(*args, **kwargs)
    composition = composed(registry, tasks)
    if not _divided_within(registry, facts, distinct):
        try:
            with registry.within(Mixed.within(composition, facts)):
                return model.forward(*args, **kwargs)
        except UnfitError as error:
            batches.forget((args, kwargs), len(tasks), training, facts)
            if training:
                # norms may have updated their statistics already, so this call cannot be repeated
                raise VisadaptError(f"{error}; call it again, and it will run one task at a time") from error
    return _one_by_one(model, registry, composition, facts, args, kwargs)


def _for_all(model: nn.Module, registry: Registry, tasks: Any, given: Any, cut: Any, classes: int | None) -> Any:
    """Run a whole model on one sample for several tasks: its backbone once as far as the tasks do not act."""
    batches, distinct = registry.facts.batches, tuple(dict.fromkeys(tasks))
    views = repeated(given, cut, len(tasks), views=True)
    facts = batches.facts(model, views, len(tasks), len(distinct) > 1, classes)
    if len(distinct) > 1 and not _divided_within(registry, facts, distinct):
        composition = composed(registry, tasks)
        shared = batches.shared(model, given, facts, frozenset(composition.profiles), composition.all_roles)
        if shared is not None:
            with registry.within(Mixed.within(composition, facts, shared)):
                return model.forward(*given[0], **given[1])
    # the tasks act from the start, or where they part is not established
    args, kwargs = repeated(given, cut, len(tasks))
    return enter(model, registry, tasks, args, kwargs)


READS_CONTEXT = torch.__version__ >= "2.14"
"""Whether the compiler reads in a graph which task is meant. Where it cannot, its graphs are torn at every host, where
a batch's composition is no longer known, and a mixed batch is not compiled."""

_uncompiled: Callable[..., Any] = torch.compiler.disable(enter)  # type: ignore[no-untyped-call]


def _divided_within(registry: Registry, facts: RowFacts, distinct: tuple[str | None, ...]) -> bool:
    """Return whether the tasks differ at a module whose rows are not known."""
    paths = [path for path, host in registry.hosts.items() if host._forward_pre_hooks or not facts.knows(path)]
    return (
        any(_differ(registry, facts, path, distinct) for path in paths) or bool(facts.reordered) or not facts.evidence
    )


def _differ(registry: Registry, facts: RowFacts, path: str, distinct: tuple[str | None, ...]) -> bool:
    """Return whether the tasks differ at one module whose rows are not known."""
    parts, module = _parts_at(registry, path), registry.hosts.get(path)
    if facts.knows(path) and not (module is not None and module._forward_pre_hooks):
        return False
    owners = [name for name in distinct if name is not None and changes(parts, name)]
    if facts.knows(path):
        # a forward pre-hook may read the module's weights (torch's older weight norm does)
        return bool(owners)
    if path in facts.hosts:
        return len({name if name in parts else None for name in distinct}) > 1
    # not called in the examined forwards; if it is called now, it raises. Its weights may be read without a call, by an
    # enclosing module whose rows may be known (as attention reads the weights of its output projection)
    around = [outer for outer in registry.hosts if path.startswith(f"{outer}.") and facts.knows(outer)]
    covered = any(all(changes(_parts_at(registry, outer), name) for name in owners) for outer in around)
    return bool(owners) and len(distinct) > 1 and not covered


def _parts_at(registry: Registry, path: str) -> Parts:
    module = registry.hosts.get(path)
    parts = None if module is None else module._modules.get(CHILD)
    # another thread may just have removed the last task here
    return parts if isinstance(parts, Parts) else Parts()


def _one_by_one(
    model: nn.Module,
    registry: Registry,
    composition: Composition,
    facts: RowFacts,
    args: Any,
    kwargs: Any,
) -> Any:
    division = Division(composition.number, type(model).__name__, composition.samples)
    cache = next((key for key, leaf in leaves((args, kwargs)) if is_cache(leaf)), None)
    if cache is not None or kwargs.get("use_cache") is True:
        raise CacheError(
            f"a mixed batch of this {type(model).__name__} runs one task at a time, and tasks cannot share a cache: "
            "call it without one (use_cache=False), or run one task at a time"
        )
    outs = []
    try:
        for number, name in enumerate(composition.names):
            own_args, own_kwargs = division.share((args, kwargs), _all_free(facts, (args, kwargs)), number)
            with registry.within(name):
                outs.append(model.forward(*own_args, **own_kwargs))
        return division.join(outs, facts.outputs)
    except UnfitError as error:
        raise VisadaptError(
            f"a mixed batch of this {type(model).__name__} runs one task at a time, and {error}"
        ) from error


def _all_free(facts: RowFacts, given: Any) -> dict[Any, Any]:
    return {**{key: "free" for key, leaf in leaves(given) if isinstance(leaf, Tensor)}, **facts.cut}


def check_compiled(model: nn.Module, registry: Registry, tasks: Any, args: Any, kwargs: Any) -> None:
    """Check a batch of mixed tasks while ``torch.compile`` traces, when its rows cannot be examined.

    Raises:
        VisadaptError: no batch of this model has been examined yet; the number of tasks is not the batch size.
    """
    first = _first_tensor((*args, *kwargs.values()))
    if tasks == AUTO or not registry.facts.batches.hosts:
        raise VisadaptError(
            "run one batch of these tasks before torch.compile: it shows which rows belong to which sample"
        )
    if first is not None and first.shape[0] != len(tasks):
        raise VisadaptError(f"{len(tasks)} tasks were named for a batch of {first.shape[0]}: name one per sample")


def _first_tensor(values: Iterable[Any]) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor):
            return value
    return None
