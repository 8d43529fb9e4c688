"""Plans: all that an inject will do, computed before anything changes, so that an error leaves nothing half done."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.facts import Facts
from visadapt.backbone.modules import within
from visadapt.backbone.site import WEIGHT, Sites
from visadapt.backbone.structure import STRUCTURE
from visadapt.errors import VisadaptError
from visadapt.methods.layers import is_undrawn
from visadapt.methods.method import Method
from visadapt.runtime import hf_config, host
from visadapt.runtime.copies import build_head, own_copy, own_module
from visadapt.runtime.drawn import bits_of
from visadapt.runtime.forwards import check_loaded, detach_copy
from visadapt.runtime.registry import Placement, Registry, Task, find_registry
from visadapt.runtime.roles import role
from visadapt.runtime.root import capture_calls


@dataclass
class Plan:
    """All that an inject will do, computed before anything changes."""

    task: Task
    parts: list[tuple[str, str, nn.Module]]
    """Host path, part name, module."""
    sites: Sites = field(default_factory=Sites)


Adapters = Iterable[tuple[str, nn.Module]]
"""What one method puts into a backbone: each adapter with its host's path."""


def new_plan(
    facts: Facts, task: Task, placements: Sequence[tuple[Method, Sites]], built: Sequence[Adapters] = ()
) -> Plan:
    """The parts of a new task: its norms, the adapters of each method, its head.

    Args:
        facts: of the backbone.
        task: its description, to which the placements are added.
        placements: each method with its sites.
        built: the adapters of each placement on the meta device, if the caller has them and puts tensors in the place
            of theirs. Those that have others beside these are built anew.
    """
    check_loaded(facts.modules)
    parts: list[tuple[str, str, nn.Module]] = []
    if task.head_at is not None:
        width = task.num_classes if task.head == "new" else None
        parts += [(path, "head", part) for path, part in build_head(facts, task.head_at, width).items()]
        task.head_at = task.head_at.placed()
        task.drawn = None if width is None or is_undrawn() else bits_of(part for _, _, part in parts)
    parts += [(path, "also", own_module(facts, path)) for path in task.also]
    if task.norms != "frozen":
        parts += [
            (path, "norm", own_copy(norm, full=task.norms == "full"))
            for path, norm in facts.norms.items()
            # the norms inside modules of the task's own are its own already
            if not within(path, task.owned)
        ]
    for path, _, part in parts:
        detach_copy(part, facts.modules[path], path)
    plan = Plan(task, parts)
    for number, (method, sites) in enumerate(placements):
        own = list(built[number]) if built else []
        _place(facts, plan, method, sites, own if all(_is_empty(part) for _, part in own) else [])
    return plan


def _is_empty(part: nn.Module) -> bool:
    """Whether all tensors of a part are those of its state dict, and on the meta device."""
    return not any(
        module._non_persistent_buffers_set
        or any(isinstance(value, Tensor) for value in module.__dict__.values())
        or any(t is not None and not t.is_meta for t in (*module._parameters.values(), *module._buffers.values()))
        for module in part.modules()
    )


def extended_plan(
    facts: Facts,
    task: Task,
    method: Method,
    sites: Sites,
    num_classes: int | None,
    labels: Sequence[str] | None,
    head: Any,
    norms: str,
    also: Sequence[str] = (),
) -> Plan:
    """The plan that adds a method to an existing task; what it owns beside adapters does not change."""
    if norms != task.norms:
        raise VisadaptError(f"task {task.name!r} has norms={task.norms!r} already; it cannot have {norms!r} as well")
    if also and tuple(also) != task.also:
        raise VisadaptError(f"task {task.name!r} exists: train_also= is for its first inject; name another task")
    if num_classes not in (None, task.num_classes) or head not in ("auto", task.head) or labels is not None:
        raise VisadaptError(
            f"task {task.name!r} has its head already ({task.head}, {task.num_classes} classes): add methods to it "
            "without num_classes=, labels= and head=, or name another task"
        )
    check_loaded(facts.modules)
    plan = Plan(dataclasses.replace(task, placements=list(task.placements), hosts=list(task.hosts)), [])
    alike = [placement for placement in task.placements if placement.method.part == method.part]
    taken = {name for placement in alike for name in placement.sites}
    twice = [f" at {site.full_name}" for site in sites if site.full_name in taken]
    if twice or (alike and not sites):
        raise VisadaptError(f"task {task.name!r} has a {method.part}{''.join(twice[:1])} already: name another task")
    _place(facts, plan, method, sites)
    return plan


def _place(facts: Facts, plan: Plan, method: Method, sites: Sites, built: Adapters = ()) -> None:
    _check_outside_owned(plan.task, sites)
    dtype = facts.dtype
    plan.parts += [(path, method.part, part.to(dtype=dtype)) for path, part in built]
    for path, part in () if built else method.parts(facts, sites, plan.task):
        device = device_of(facts.modules[path], facts.model)
        plan.parts.append((path, method.part, part.to(device=device, dtype=dtype)))
    _check_weights(plan, method, sites)
    plan.task.placements.append(Placement(method, tuple(site.full_name for site in sites)))
    plan.sites = Sites((*plan.sites, *sites))


def _check_weights(plan: Plan, method: Method, sites: Sites) -> None:
    """Refuse a method that would act on the output of a module that is never called."""
    hosts = {site.host for site in sites if site.kind == WEIGHT}
    for path, name, part in plan.parts:
        if path in hosts and name == method.part and role(part) != "weights":
            raise VisadaptError(
                f"{path} is never called: other code computes with its weight; choose a method that changes the weight "
                "itself, such as LoRA or DoRA"
            )


def _check_outside_owned(task: Task, sites: Sites) -> None:
    """Refuse adapters in a module that the task replaces: they would see other logits, or never run."""
    for site in sites:
        path = next((path for path in task.owned if within(site.host, [path])), None)
        if path is not None:
            where = "is" if site.host == path else "is in"
            if path in task.also:
                raise VisadaptError(
                    f"{site.host} {where} {path}, of which task {task.name!r} trains its own copy (train_also=): "
                    "leave it out of where="
                )
            raise VisadaptError(
                f"{site.host} {where} the head that task {task.name!r} replaces: leave it out, or pass head='frozen'"
            )


def device_of(module: nn.Module, model: nn.Module) -> torch.device:
    """The device that a task's parts at a module are on."""
    for candidate in (module, model):
        for tensor in candidate.parameters():
            return tensor.device
    return torch.device("cpu")


def commit(facts: Facts, plan: Plan) -> Registry:
    """Carry out a plan.

    Raises:
        VisadaptError: a frozen embedding would be changed by its own forward; nothing was changed then.
    """
    _check_renormalised(facts, plan)
    with STRUCTURE:
        return _committed(facts, plan)


def _check_renormalised(facts: Facts, plan: Plan) -> None:
    """Refuse a backbone whose embedding scales rows of its weight in place, in eval mode too, as those in use come."""
    own = {path for path, _, part in plan.parts if role(part) in ("weights", "instead")}
    for path, module in facts.modules.items():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None and path not in own:
            raise VisadaptError(
                f"the forward of {path} changes its weight (max_norm={module.max_norm:g}), which is frozen and shared "
                "by all tasks: scale all rows once, by weight.data = torch.renorm(weight.data, "
                f"{module.norm_type:g}, 0, {module.max_norm:g}), and set max_norm = None, which gives the same outputs"
            )


def _committed(facts: Facts, plan: Plan) -> Registry:
    model = facts.model
    registry = find_registry(model)
    if registry is None:
        registry = Registry(facts)
        registry.trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        model.requires_grad_(False)
        model.zero_grad()  # an optimiser changes every parameter that has a gradient
        for module in facts.modules.values():
            host.freeze(module)
            host.unfuse(module, registry)
        if hf_config.is_labelled(model):
            hf_config.label(model)
        capture_calls(model)
        model.__dict__["_visadapt"] = registry
    task = plan.task
    if task.name not in registry.tasks:
        task.number = registry.last_number = registry.last_number + 1
    if task.head != "frozen" and hf_config.is_labelled(model):
        registry.configs[task.name] = hf_config.task_config(model, task)
    for path, name, part in plan.parts:
        module = facts.modules[path]
        part.train(model.training)
        host.attach(module, registry, path, task.name, name, part)
        if registry.lean is not None:
            registry.lean.apply(part)
    paths = dict.fromkeys(path for path, _, _ in plan.parts)
    registry.hosts = {**registry.hosts, **{path: facts.modules[path] for path in paths}}
    task.hosts = list(dict.fromkeys((*task.hosts, *paths)))
    registry.traced = {**registry.traced, **{site.full_name: site for site in plan.sites if site.traced}}
    new = task.name not in registry.tasks
    # last, so that half a task cannot be chosen
    registry.tasks = {**registry.tasks, task.name: task}
    if new and registry.lean is not None:
        registry.lean.admit(task.name)
    registry.watch.look_at(model, registry.hosts)
    registry.introduce(task.name)
    registry.settle()
    return registry


def warn_if_larger(plan: Plan) -> None:
    placed = {(path, name): part for path, name, part in plan.parts}
    method = plan.task.placements[-1].method if plan.task.placements else None
    for site in plan.sites:
        part = placed.get((site.host, method.part)) if method else None
        size = 0 if part is None else sum(p.numel() for p in part.parameters())
        if 0 < site.adapts < size:
            warnings.warn(
                f"the {method.part if method else ''} at {site.full_name} has {size:,} parameters, more than the "
                f"{site.adapts:,} of what it adapts: choose a smaller m or other sites",
                stacklevel=3,
            )
            return
