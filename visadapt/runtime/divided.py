"""How a batch of mixed tasks runs: one pass over the whole batch, or one pass per task.

Before the first batch of a kind runs, the rows of each sample are found at every module (see `visadapt.backbone.rows`).
If they are known at every module where the batch's tasks differ, the backbone runs once over the whole batch.
Otherwise it runs one task at a time on that task's samples and the outputs are joined: slower, but always exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from visadapt.backbone.added import note_replacing
from visadapt.backbone.batch import is_cache, leaves
from visadapt.backbone.entry import WHOLE
from visadapt.backbone.known_batches import KnownBatches
from visadapt.backbone.modules import CHILD
from visadapt.backbone.rows import RowFacts, shape_of
from visadapt.backbone.shared_pass import repeated
from visadapt.errors import VisadaptError
from visadapt.runtime.composition import Composition, composed
from visadapt.runtime.division import Division, UnfitError
from visadapt.runtime.noting import unsettled
from visadapt.runtime.registry import Mixed, Parts, Registry
from visadapt.runtime.roles import AROUND
from visadapt.runtime.weights import changes


class CacheError(VisadaptError):
    """A key-value cache was passed with a mixed batch that runs one task at a time; tasks cannot share one."""


TRYING: ContextVar[frozenset[Registry]] = ContextVar("visadapt_trying", default=frozenset())
"""Models whose hosts refuse mixed batches that do not come through an entry, while a call is tried or examined."""


@contextlib.contextmanager
def trying(registry: Registry) -> Iterator[None]:
    """Let the hosts of a model refuse mixed batches that do not come through an entry."""
    token = TRYING.set(TRYING.get() | {registry})
    try:
        yield
    finally:
        TRYING.reset(token)


def run_batch(
    model: nn.Module,
    registry: Registry,
    tasks: tuple[str | None, ...],
    call: Callable[..., Any],
    batches: KnownBatches,
    args: Any,
    kwargs: Any,
) -> Any:
    """Run a batch of mixed tasks.

    Args:
        model: the injected model.
        registry: its registry.
        tasks: one task per sample.
        call: the bound method to run: the model's forward, or another method of it or of a module inside it.
        batches: row facts of that method's batches.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Raises:
        VisadaptError: the number of tasks is not the number of samples; samples depend on each other; the batch cannot
            be split or the outputs cannot be joined.
    """
    distinct = tuple(dict.fromkeys(tasks))
    training = bool(model.__dict__["training"])
    head = registry.facts.head
    classes = None if head is None else head.width(registry.facts.modules)
    if batches.entry == WHOLE:
        one = batches.single(model, (args, kwargs), len(tasks), classes)
        if one is not None:
            return _for_all(model, registry, tasks, call, (args, kwargs), one, classes)
    with trying(registry):
        facts = batches.facts(model, (args, kwargs), len(tasks), len(distinct) > 1, classes)
    if len(distinct) == 1:
        with registry.within(distinct[0]):
            return call(*args, **kwargs)
    composition = composed(registry, tasks)
    if not _divided_within(registry, facts, composition):
        try:
            out, replacing = _noted(registry, Mixed.within(composition, facts), call, (args, kwargs))
            if not replacing:
                return out
            batches = _with_hooks(registry, batches, replacing)
            with trying(registry):
                found = batches.facts(model, (args, kwargs), len(tasks), True, classes)
            if shape_of(found) == shape_of(facts):
                return out
            if training:
                raise unsettled(replacing[0])
            return run_batch(model, registry, tasks, call, batches, args, kwargs)
        except UnfitError as error:
            batches.forget((args, kwargs), len(tasks), training, facts)
            if training:
                # norms may have updated their statistics already, so this call cannot be repeated
                raise VisadaptError(f"{error}; call it again, and it will run one task at a time") from error
    return _one_by_one(model, registry, composition, call, facts, args, kwargs)


def _noted(registry: Registry, mixed: Any, call: Callable[..., Any], given: tuple[Any, Any]) -> tuple[Any, list[Any]]:
    """Return the output of a mixed batch, and the hooks that replaced anything for the first time."""
    with registry.noted.within(registry.facts.hooked) as replacing, registry.within(mixed):
        out = call(*given[0], **given[1])
    return out, replacing


def _with_hooks(registry: Registry, batches: KnownBatches, replacing: list[Any]) -> KnownBatches:
    """The row facts of a method's batches, found anew since some hooks are known to take part."""
    for hook in replacing:
        note_replacing(hook)
    return registry.facts.of_batches(batches.entry)


def _for_all(
    model: nn.Module,
    registry: Registry,
    tasks: Any,
    call: Callable[..., Any],
    given: Any,
    cut: Any,
    classes: int | None,
) -> Any:
    """Run a whole model on one sample for several tasks: its backbone once as far as the tasks do not act."""
    batches, distinct = registry.facts.batches, tuple(dict.fromkeys(tasks))
    views = repeated(given, cut, len(tasks), views=True)
    facts = batches.facts(model, views, len(tasks), len(distinct) > 1, classes)
    composition = composed(registry, tasks)
    if len(distinct) > 1 and not _divided_within(registry, facts, composition):
        shared = batches.shared(model, given, facts, frozenset(composition.profiles), composition.all_roles)
        if shared is not None:
            out, replacing = _noted(registry, Mixed.within(composition, facts, shared), call, given)
            if not replacing:
                return out
            batches = _with_hooks(registry, batches, replacing)
            found = batches.facts(model, views, len(tasks), True, classes)
            key = frozenset(composition.profiles)
            same = batches.shared(model, given, found, key, composition.all_roles) == shared
            if same and shape_of(found) == shape_of(facts):
                return out
            if model.__dict__["training"]:
                raise unsettled(replacing[0])
    # the tasks act from the start, or where they part is not established
    args, kwargs = repeated(given, cut, len(tasks))
    return run_batch(model, registry, tasks, call, batches, args, kwargs)


def _divided_within(registry: Registry, facts: RowFacts, composition: Composition) -> bool:
    """Return whether the tasks differ at a module whose rows are not known, or that writes to its input."""
    paths = [path for path, host in registry.hosts.items() if host._forward_pre_hooks or not facts.knows(path)]
    writers = [path for path in registry.hosts if path in facts.hosts and facts.hosts[path].writes]
    return (
        any(composition.roles(path).difference(AROUND) for path in writers)
        or any(_differ(registry, facts, path, composition.names) for path in paths)
        or bool(facts.reordered)
        or not facts.evidence
    )


def _differ(registry: Registry, facts: RowFacts, path: str, distinct: Sequence[str | None]) -> bool:
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
    call: Callable[..., Any],
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
    if facts.kept:
        raise VisadaptError(
            f"a mixed batch of this {type(model).__name__} runs one task at a time, and each forward keeps a tensor "
            f"for the next one ({facts.kept}), which would be of another task's samples: call it without it "
            "(use_cache=False, if it is a cache), or run one task at a time"
        )
    outs = []
    try:
        for number, name in enumerate(composition.names):
            own_args, own_kwargs = division.share((args, kwargs), _all_free(facts, (args, kwargs)), number)
            with registry.within(name):
                outs.append(call(*own_args, **own_kwargs))
        return division.join(outs, facts.outputs)
    except UnfitError as error:
        raise VisadaptError(
            f"a mixed batch of this {type(model).__name__} runs one task at a time, and {error}"
        ) from error


def _all_free(facts: RowFacts, given: Any) -> dict[Any, Any]:
    return {**{key: "free" for key, leaf in leaves(given) if isinstance(leaf, Tensor)}, **facts.cut}
