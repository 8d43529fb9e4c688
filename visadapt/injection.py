"""``inject``, the one verb, and its inverses ``remove`` and ``eject``."""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import nn
from torch.utils._pytree import tree_map

from visadapt.arguments import readable
from visadapt.backbone.facts import Facts
from visadapt.backbone.heads import Head, head_at, modules_at
from visadapt.backbone.modules import CHILD, ModelT, own_modules, unfreeze, unwrapped, within
from visadapt.backbone.norms import affine_of
from visadapt.backbone.site import Sites, Where
from visadapt.backbone.structure import STRUCTURE
from visadapt.backbone.trace import check_input
from visadapt.backbone.where import select
from visadapt.checks import check_choice, check_num_classes, check_width, is_among
from visadapt.data.hub import resolve
from visadapt.errors import VisadaptError, nearest
from visadapt.frozen.lean_model import unlean
from visadapt.methods import METHODS, Bottleneck
from visadapt.methods.method import Method
from visadapt.methods.policy import HEAD_POLICIES, NORM_POLICIES, HeadPolicy, NormPolicy
from visadapt.plan import commit, extended_plan, new_plan, warn_if_larger
from visadapt.printable import shown
from visadapt.runtime import host
from visadapt.runtime.registry import Registry, Source, Task, check_task_name, facts_of, find_registry, registry_of


# fmt: off
@overload
def inject(
    model: ModelT, method: Method | type[Method] | str | None = ..., *,
    m: int | float | None = ..., budget: float | None = ..., task: str = ..., num_classes: int | None = ...,
    labels: Sequence[str] | None = ..., head: HeadPolicy | str | Sequence[str] = ...,
    train_also: str | Sequence[str] = ..., norms: NormPolicy = ..., where: Where | None = ..., example: Any = ...,
) -> ModelT: ...
@overload
def inject(
    model: Callable[..., ModelT], method: Method | type[Method] | str | None = ..., *,
    m: int | float | None = ..., budget: float | None = ..., task: str = ..., num_classes: int | None = ...,
    labels: Sequence[str] | None = ..., head: HeadPolicy | str | Sequence[str] = ...,
    train_also: str | Sequence[str] = ..., norms: NormPolicy = ..., where: Where | None = ..., example: Any = ...,
    **build: Any,
) -> ModelT: ...
@overload
def inject(
    model: str, method: Method | type[Method] | str | None = ..., *,
    m: int | float | None = ..., budget: float | None = ..., task: str = ..., num_classes: int | None = ...,
    labels: Sequence[str] | None = ..., head: HeadPolicy | str | Sequence[str] = ...,
    train_also: str | Sequence[str] = ..., norms: NormPolicy = ..., where: Where | None = ..., example: Any = ...,
    **build: Any,
) -> nn.Module: ...
# fmt: on
def inject(
    model: nn.Module | Callable[..., nn.Module] | str,
    method: Method | type[Method] | str | None = None,
    *,
    m: int | float | None = None,
    budget: float | None = None,
    task: str = "default",
    num_classes: int | None = None,
    labels: Sequence[str] | None = None,
    head: HeadPolicy | str | Sequence[str] = "auto",
    train_also: str | Sequence[str] = (),
    norms: NormPolicy = "auto",
    where: Where | None = None,
    example: Any = None,
    **build: Any,
) -> nn.Module:
    """Add a method's adapters to a backbone, freeze the backbone, and activate the task.

    The model itself is changed and returned: same object, same class, same keys in ``state_dict``. Called again with
    the same ``task`` it adds another method to that task; with another it begins a new task on the same backbone.

    Args:
        model: a module; a builder such as torchvision's ``resnet50``; or a name: ``"timm/resnet50.a1_in1k"``,
            ``"torchvision/vgg16"``, ``"hf/bert-base-uncased"``, ``"bundled/resnet50"``.
        method: what to put in; ``Bottleneck()`` by default. A string names a method with its default options.
        m: width of the bottleneck, an int or a fraction of each site's width in (0, 1).
        budget: instead of ``m``: the largest width whose adapters and norms stay within this fraction of the backbone's
            parameters (0.02 is 2 %); heads are not counted on either side.
        task: name of the task that owns what is put in.
        num_classes: width of the task's new head; None keeps the backbone's (see ``head``).
        labels: names of the classes, in the order of the logits; kept in the task's file.
        head: a policy, or where the head is.

            * ``"new"``: the task's own, with layers of ``num_classes`` outputs;
            * ``"copy"``: the task trains a copy of the backbone's head;
            * ``"frozen"``: the backbone's own, not trained;
            * ``"auto"``: new if ``num_classes`` is given, else a copy of what transformers'
              ``…ForSequenceClassification`` made for the problem, else the backbone's own, frozen;
            * a path, or a list of paths, of modules of the model: these are the head, new if ``num_classes`` is given
              and else copied. A module with the name of a policy is named in a list: ``head=["new"]``.

            The head is known from its library: timm's classifiers, the attribute that torchvision's forward ends in,
            what stands beside transformers' base model. In other models it is the layers that make the output, as a run
            on fake tensors shows (with ``example``, if the model's input cannot be guessed). Several layers that make
            logits together, and auxiliary ones, follow ``num_classes`` together; if each output has its own, name one.
            A base model has no head, and a language model's belongs to its vocabulary.
        train_also: paths of further modules of which the task trains a copy: a second head, a detector's box predictor,
            an embedding. They are saved with the task, and mixed batches run each sample through its own task's.
            Norms in them are trained whole, and adapters are put elsewhere.
        norms: what the task owns of the norms: ``frozen`` (nothing), ``affine`` (its own weights and biases; the
            running statistics never move) or ``full`` (statistics too, which move in train mode). ``auto``
            is ``affine``, and ``frozen`` for `visadapt.Linear` and a `visadapt.Ladder`.
        where: which sites; see `visadapt.sites`. By default the method's own kinds.
        example: an input to trace shapes with, where a glob in ``where`` names modules that are not known sites.
        **build: passed to the builder, or to the loader of a name, such as ``weights="DEFAULT"``.

    Returns:
        The same model.

    Raises:
        VisadaptError: something in the request matches nothing or contradicts what is there. Nothing was changed then.

    Examples:
        >>> model = visadapt.inject(backbone, m=8, task="flowers", num_classes=3)
        >>> model is backbone, visadapt.active(model)
        (True, 'flowers')
        >>> model = visadapt.inject(model, visadapt.Parallel(), task="birds", num_classes=5, where="conv3x3")
        >>> list(visadapt.tasks(model))
        ['flowers', 'birds']

        A head that is named by its path, and a block that the task trains as a whole beside it:

        >>> model = visadapt.inject(model, m=8, task="c", head="fc", num_classes=4, train_also="layer4.0")
        >>> visadapt.tasks(model)["c"].owned
        ('fc', 'layer4.0')
        >>> [name for name, _ in visadapt.named_parameters(model, "c") if name.startswith("fc")]
        ['fc.head.weight', 'fc.head.bias']
    """
    backbone = _resolve(model, build)
    chosen = _method(method, m, budget)
    policy: str = chosen.norms if is_among(norms, ["auto"]) else norms
    _check_options(task, num_classes, labels, policy)
    if example is not None:
        check_input(example, "example")
    with STRUCTURE:
        registry = _inject(
            backbone, chosen, budget, task, num_classes, labels, head, train_also, policy, where, example
        )
        if isinstance(model, str):
            registry.source = Source(model, build)
    return model if isinstance(model, nn.Module) else backbone


def _inject(
    backbone: nn.Module,
    chosen: Method,
    budget: float | None,
    task: str,
    num_classes: int | None,
    labels: Sequence[str] | None,
    head: str | Sequence[str],
    train_also: str | Sequence[str],
    norms: str,
    where: Where | None,
    example: Any,
) -> Registry:
    registry = find_registry(backbone)
    facts = facts_of(backbone)
    if registry is None:
        host.check_free(backbone, facts.modules)
    also = modules_at(facts.modules, train_also, "train_also=") if not is_among(train_also, [()]) else ()
    wanted = chosen.where if where is None else where
    sites = Sites()
    if chosen.kinds or wanted is not None:
        sites = select(facts, wanted, chosen.kinds, example)
    chosen.check(facts, sites)
    if budget is not None:
        chosen = _within(facts, chosen, sites, budget, norms)
    if registry is not None and task in registry.tasks:
        plan = extended_plan(facts, registry.tasks[task], chosen, sites, num_classes, labels, head, norms, also)
    else:
        spec = _new_task(facts, task, norms, head, also, num_classes, example)
        spec.labels = None if labels is None else _checked_labels(facts, labels, spec.num_classes)
        if where is None:
            sites = Sites(site for site in sites if not within(site.host, also))
        plan = new_plan(facts, spec, [(chosen, sites)])
    warn_if_larger(plan)
    registry = commit(facts, plan)
    if example is not None:
        registry.example = tree_map(_without_values, example)
    return registry


def _without_values(leaf: Any) -> Any:
    """Return an input's shape and dtype, as a tensor that takes no memory."""
    if not isinstance(leaf, torch.Tensor) or leaf.is_nested or leaf.layout != torch.strided:
        # the shape of others, such as sparse ones, is not all that a model may ask of them
        return leaf
    return torch.zeros((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)


def remove(model: ModelT, task: str) -> ModelT:
    """Remove a task from a model; the other tasks and the backbone do not change.

    Args:
        model: an injected model.
        task: its name. If it is the active one, the bare backbone is active afterwards.

    Returns:
        The same model.

    Raises:
        VisadaptError: the model has no such task.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> model = visadapt.inject(model, m=4, task="birds", num_classes=5)
        >>> list(visadapt.tasks(visadapt.remove(model, "flowers")))
        ['birds']
    """
    registry = registry_of(model)
    with STRUCTURE:
        gone = registry.task(task)
        # first, so that code that finds its parts missing reports the removal
        registry.tasks = {name: other for name, other in registry.tasks.items() if name != task}
        registry.withdraw(task)
        registry.forget(task)
        hosts = registry.hosts
        for path in gone.hosts:
            host.detach(hosts[path], task)
        registry.hosts = {path: module for path, module in hosts.items() if CHILD in module._modules}
        registry.configs.pop(task, None)
        registry.watch.look_at(unwrapped(model), registry.hosts)
    return model


def eject(model: ModelT) -> ModelT:
    """Remove all tasks and restore the original, bit for bit: weights, classes, keys, modes and ``requires_grad``.

    Args:
        model: an injected model.

    Returns:
        The same model.

    Raises:
        VisadaptError: the model was never injected; its original weights were not kept (see `visadapt.lean`).

    Examples:
        >>> images = torch.randn(2, 3, 32, 32)
        >>> before = backbone.eval()(images)
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> torch.equal(visadapt.eject(model)(images), before)
        True
    """
    registry = registry_of(model)
    backbone = unwrapped(model)
    with STRUCTURE:
        unlean(model)
        for name in list(registry.tasks):
            remove(backbone, name)
        for module in own_modules(backbone).values():
            # what replaced a host may have taken its children over
            module._modules.pop(CHILD, None)
            unfreeze(module)
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name in registry.trained)
            parameter.grad = None
        del backbone.__dict__["_visadapt"]
    return model


def _resolve(model: Any, build: dict[str, Any]) -> nn.Module:
    if isinstance(model, nn.Module):
        if build:
            names = [*inspect.signature(inject).parameters]
            key = next(iter(build))
            raise VisadaptError(f"inject takes no {key!r}{nearest(key, names)}")
        return unwrapped(model)
    return resolve(model, **build)


def _method(given: Any, m: Any, budget: Any) -> Method:
    method = given
    if isinstance(method, str):
        check_choice(method, METHODS, "method")
        method = METHODS[method]
    if isinstance(method, type) and issubclass(method, Method):
        method = method()
    if method is None:
        method = Bottleneck()
    if not isinstance(method, Method):
        raise VisadaptError(f"method must be one of {', '.join(METHODS)} with its options, got {shown(given)}")
    if budget is not None:
        if m is not None:
            raise VisadaptError("give m= or budget=, not both")
        if isinstance(budget, bool) or not isinstance(budget, float) or not 0 < budget < 1:
            raise VisadaptError(
                f"budget must be a fraction of the backbone's parameters in (0, 1), got {shown(budget)}"
            )
    if m is not None or budget is not None:
        if not any(f.name == "m" for f in dataclasses.fields(method)):
            raise VisadaptError(
                f"{type(method).__name__} has no width m: its options are {', '.join(method.options())}"
            )
        if m is not None:
            check_width(m)
            return dataclasses.replace(method, m=m)  # type: ignore[call-arg]
    return method


def _check_options(task: Any, num_classes: Any, labels: Any, norms: Any) -> None:
    check_task_name(task)
    check_num_classes(num_classes)
    check_choice(norms, NORM_POLICIES, "norm policy")
    if not readable(labels, Sequence[str] | None):
        raise VisadaptError(f"labels must be a list of the classes' names, got {shown(labels)}")


def _checked_labels(facts: Facts, labels: Sequence[str], num_classes: int | None) -> tuple[str, ...]:
    width = num_classes
    if width is None and facts.head is not None:
        width = facts.head.classes(facts.modules)
    if width is not None and len(labels) != width:
        raise VisadaptError(f"{len(labels)} labels for a head of {width} classes")
    twice = [label for label, times in Counter(labels).items() if times > 1]
    if twice:
        raise VisadaptError(f"labels name {twice[0]!r} twice")
    return tuple(labels)


def _new_task(
    facts: Facts, name: str, norms: str, head: Any, also: tuple[str, ...], num_classes: int | None, example: Any
) -> Task:
    """A task with the policy that ``head`` and ``num_classes`` mean, without placements."""
    if isinstance(head, str) and head not in HEAD_POLICIES and head not in facts.modules:
        known = (*HEAD_POLICIES, *filter(None, facts.modules))
        raise VisadaptError(
            f"no head policy {shown(head)}{nearest(head, known)} (head= takes {', '.join(HEAD_POLICIES)}, or paths)"
        )
    named = not isinstance(head, str) or head not in HEAD_POLICIES
    chosen = "" if named else head
    if chosen == "new" and num_classes is None:
        raise VisadaptError("head='new' needs num_classes=")
    if chosen in ("copy", "frozen") and num_classes is not None:
        raise VisadaptError(f"head={head!r} keeps the backbone's width: leave num_classes out, or pass head='new'")
    own: Head | None = None
    if named:
        own = head_at(facts.modules, head, facts.known_head, lambda: facts.trace_head(example))
    elif chosen != "frozen" and (chosen != "auto" or num_classes is not None or _made_for_the_problem(facts)):
        own = facts.look_for_head(example)
        if own is None or not own.modules:
            raise VisadaptError(
                f"no head found in {facts.name}{_why(own)}; name it with head=, or leave num_classes out"
            )
    if own is None:
        return Task(name, norms, "frozen", also=also)
    same = own.fresh and own.classes(facts.modules) == num_classes
    if num_classes is not None and not same and (own.obstacle or not own.finals):
        reason = own.obstacle or "the layers that give its logits are not known; name them with head="
        raise VisadaptError(f"{facts.name} cannot have num_classes={num_classes}: {reason}")
    overlap = [path for path in also if within(path, own.modules) or any(within(m, [path]) for m in own.modules)]
    if overlap:
        raise VisadaptError(f"train_also= names {overlap[0]}, which is the task's own head already")
    width = own.classes(facts.modules) if num_classes is None else num_classes
    return Task(name, norms, "copy" if num_classes is None else "new", width, head_at=own, also=also)


def _made_for_the_problem(facts: Facts) -> bool:
    return facts.known_head is not None and facts.known_head.fresh


def _why(head: Head | None) -> str:
    if head is None:
        return ": it does not run on a guessed input (pass example=)"
    return f": {head.obstacle}" if head.obstacle else ""


def _within(facts: Facts, method: Method, sites: Sites, budget: float, norms: str) -> Method:
    """The method with the largest m whose adapters and norms stay within ``budget`` of the backbone, heads aside."""
    allowed = budget * facts.size
    copied = facts.norms.values() if norms != "frozen" else ()
    fixed = sum(t.numel() for norm in copied for t in affine_of(norm).values())

    def cost(width: int) -> int:
        sized = dataclasses.replace(method, m=width)  # type: ignore[call-arg]
        return fixed + sum(sized.count(site, facts.modules[site.host]) for site in sites)

    low, high = 0, max(site.channels for site in sites)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= allowed else (low, middle - 1)
    if low == 0:
        raise VisadaptError(
            f"budget={budget:g} allows {allowed:,.0f} parameters, but m=1 already takes {cost(1):,}"
            + (f" ({fixed:,} of them the norms: norms='frozen' saves these)" if fixed else "")
        )
    return dataclasses.replace(method, m=low)  # type: ignore[call-arg]
