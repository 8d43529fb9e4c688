"""Combine trained tasks into a new one without training: weighted averages, and TIES."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from visadapt.arguments import readable
from visadapt.backbone.facts import Facts
from visadapt.backbone.modules import ModelT
from visadapt.backbone.site import Sites
from visadapt.backbone.structure import STRUCTURE
from visadapt.checks import check_choice, check_positive, is_real
from visadapt.errors import VisadaptError
from visadapt.plan import Plan, commit, new_plan
from visadapt.printable import shown
from visadapt.runtime.registry import Registry, Task, check_hosts, check_task_name, facts_of, registry_of

WAYS = ("average", "ties")

_DENSITY = 0.2
"""Fraction of the values that TIES keeps (Yadav et al. 2023, §5)."""


@torch.no_grad()
def combine(
    model: ModelT,
    weights: Mapping[str, float],
    into: str,
    how: Literal["average", "ties"] = "average",
    *,
    density: float | None = None,
    scale: float | None = None,
) -> ModelT:
    """Make a new task from trained tasks of one method at the same sites, and activate it.

    Every tensor of the tasks is combined with its counterparts: adapters, norms, head and further modules.

    ``average``: θ = Σ wᵢ·θᵢ.

    ``ties`` (TIES-Merging, Yadav et al. 2023, arXiv 2306.01708, Algorithm 1), on the differences τᵢ = θᵢ − θ₀: of each
    task the ``density`` largest values by magnitude are kept and the others set to zero; each value's sign is that of
    Σ wᵢ·τᵢ; τ is the weighted mean over the tasks whose value is of that sign; θ = θ₀ + ``scale``·τ. θ₀ is what a new
    task starts from where that is not drawn at random (the backbone's norms, head and weights; the zeros of an
    adapter), and zero where it is.

    What is averaged are parameters, and that is not the same for every method:

    * Where an adapter's change is linear in one tensor (a full ``Parallel`` or ``Series``, ``DAN``, ``SSF``, biases,
      norms, own weights, or factors of which tasks share one, as with ``Parallel(factor_of=…)``), the average of the
      parameters changes each kernel by the average of the changes.
    * Of low-rank products (``LoRA``, ``Parallel(rank=…)``, linear bottlenecks) the factors are averaged:
      (Σ wᵢ·Bᵢ)·(Σ wᵢ·Aᵢ), which has the tasks' rank and terms Bᵢ·Aⱼ across tasks, and is not the average
      Σ wᵢ·Bᵢ·Aᵢ of their changes, whose rank may be the sum of theirs.
    * The units of a ``Bottleneck`` are in no particular order. Tasks that were trained from one initial state (copies
      of one task, say) keep a common order; units of tasks that were drawn apart do not correspond to each other.

    Running statistics (``norms="full"``) become those of a mixture of the tasks' data in the proportions wᵢ:
    μ = Σ wᵢ·μᵢ and σ² = Σ wᵢ·(σᵢ² + μᵢ²) − μ², since the variance of a mixture is more than the mean of the variances
    wherever the means differ. (An instance norm's statistics are averages over instances, so both are averaged.) They
    are exact for a layer whose input the tasks do not change, and an estimate behind others: a few batches in train
    mode improve it.

    Args:
        model: an injected model.
        weights: the tasks and their weights wᵢ > 0, which sum to 1.
        into: name of the new task.
        how: ``"average"`` or ``"ties"``.
        density: for TIES, the fraction of each task's values to keep, in (0, 1]; None for 0.2.
        scale: for TIES, λ; None for 1.

    Returns:
        The same model. The new task's note ``combined`` records what it was made from.

    Raises:
        VisadaptError: a task does not exist or ``into`` does; the weights do not sum to 1; the tasks differ in methods,
            sites, norm policies, heads, labels or inputs (the message names what differs). Nothing was changed then.

    Examples:
        >>> model = visadapt.inject(backbone, visadapt.Parallel(), task="day", num_classes=3)
        >>> model = visadapt.inject(model, visadapt.Parallel(), task="night", num_classes=3)
        >>> model = visadapt.combine(model, {"day": 0.7, "night": 0.3}, into="dusk")
        >>> visadapt.active(model), visadapt.tasks(model)["dusk"].notes["combined"]
        ('dusk', {'how': 'average', 'weights': {'day': 0.7, 'night': 0.3}})
    """
    registry, ties = registry_of(model), _checked(how, density, scale)
    with STRUCTURE:
        specs = _tasks(registry, weights, into)
        for spec in specs:
            check_hosts(model, spec.name)
        facts = facts_of(model)
        plan = _filled(registry, facts, specs, [float(weight) for weight in weights.values()], into, ties)
        record: dict[str, Any] = {"how": how, "weights": dict(weights)}
        plan.task.notes["combined"] = record | ({} if ties is None else dataclasses.asdict(ties))
        commit(facts, plan)
    return model


def _filled(
    registry: Registry, facts: Facts, specs: list[Task], proportions: list[float], into: str, ties: _Ties | None
) -> Plan:
    """The plan of the new task, with its values."""
    plan = _planned(registry, facts, specs, into, seed=0)
    sources = [registry.parts(spec.name) for spec in specs]
    parts = [part for _, _, part in plan.parts]
    counterparts = [[own[path][name] for own in sources] for path, name, _ in plan.parts]
    starts = None
    if ties is not None:
        again = _planned(registry, facts, specs, into, seed=1)
        starts = [_starts(part, other) for part, (_, _, other) in zip(parts, again.parts, strict=True)]
    values = _combined(parts, counterparts, proportions, starts, ties)
    buffers = [_buffers(part, own, proportions) for part, own in zip(parts, counterparts, strict=True)]
    for part, own_values, own_buffers in zip(parts, values, buffers, strict=True):
        state = {**dict(part.named_parameters(remove_duplicate=False)), **dict(part.named_buffers())}
        for key, value in {**own_values, **own_buffers}.items():
            state[key].copy_(value)
    return plan


@dataclasses.dataclass(frozen=True)
class _Ties:
    density: float
    scale: float


def _checked(how: Any, density: Any, scale: Any) -> _Ties | None:
    check_choice(how, WAYS, "way to combine tasks")
    if how == "average":
        if density is not None or scale is not None:
            raise VisadaptError("density= and scale= apply to how='ties' only")
        return None
    if density is not None and (not is_real(density) or not 0 < density <= 1):
        raise VisadaptError(f"density must be a fraction in (0, 1], got {shown(density)}")
    if scale is not None:
        check_positive(scale, "scale")
    return _Ties(_DENSITY if density is None else density, 1.0 if scale is None else scale)


def _tasks(registry: Registry, weights: Any, into: Any) -> list[Task]:
    """The tasks to combine.

    Raises:
        VisadaptError: they cannot be combined.
    """
    if not readable(weights, Mapping[Any, Any]) or len(weights) < 2:
        raise VisadaptError(
            f"weights must give two or more tasks a weight, such as {{'a': 0.5, 'b': 0.5}}, got {shown(weights)}"
        )
    first, *others = [registry.task(name) for name in weights]
    for name, weight in weights.items():
        if not is_real(weight) or weight <= 0:
            raise VisadaptError(f"the weight of task {name!r} must be a positive number, got {shown(weight)}")
    total = math.fsum(weights.values())
    if abs(total - 1) > 1e-6:
        raise VisadaptError(f"weights must sum to 1, got {total:g}")
    check_task_name(into)
    if into in registry.tasks:
        raise VisadaptError(f"the model has a task {into!r} already: remove it first, or name another")
    for other in others:
        if difference := _difference(first, other):
            raise VisadaptError(f"tasks {first.name!r} and {other.name!r} cannot be combined: {difference}")
    return [first, *others]


def _difference(one: Task, other: Task) -> str | None:
    """What keeps two tasks from being combined, in words."""
    methods = [" + ".join(str(placement.method) for placement in task.placements) for task in (one, other)]
    if [p.method for p in one.placements] != [p.method for p in other.placements]:
        return f"their methods differ ({methods[0]} and {methods[1]})"
    for first, second in zip(one.placements, other.placements, strict=True):
        apart = sorted(set(first.sites) ^ set(second.sites))
        if apart:
            only = one.name if apart[0] in first.sites else other.name
            return f"their sites differ ({apart[0]} is a site of {only!r} only)"
    for what, values in {
        "norm policies": (one.norms, other.norms),
        "heads": (one.head, other.head),
        "numbers of classes": (one.num_classes, other.num_classes),
        "labels": (one.labels, other.labels),
        "places of the head": (one.head_at, other.head_at),
        "further modules (train_also=)": (one.also, other.also),
        "inputs": (one.notes.get("inputs"), other.notes.get("inputs")),
        "kinds of output (problem_type)": (one.notes.get("problem_type"), other.notes.get("problem_type")),
    }.items():
        if values[0] != values[1]:
            return f"their {what} differ ({values[0]!r:.120} and {values[1]!r:.120})"
    return None


def _planned(registry: Registry, facts: Facts, specs: Sequence[Task], into: str, seed: int) -> Plan:
    """A new task like the first; its initial values are drawn from a seed, and the caller's random numbers stay."""
    first = specs[0]
    notes = {
        key: value for key, value in first.notes.items() if all(spec.notes.get(key) == value for spec in specs)
    }  # fmt: skip
    notes.pop("metrics", None)
    task = dataclasses.replace(first, name=into, placements=[], hosts=[], notes=notes, origin=None)
    known = {site.full_name: site for site in facts.sites()} | registry.traced
    placements = [(each.method, Sites(known[name] for name in each.sites)) for each in first.placements]
    devices = {p.device.index for p in facts.model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(seed)
        return new_plan(facts, task, placements)


def _starts(part: nn.Module, other: nn.Module) -> dict[str, Tensor]:
    """θ₀ of a part's parameters: its initial value if two seeds agree on it, zero if it is drawn."""
    again = dict(other.named_parameters(remove_duplicate=False))
    return {
        key: value.detach().clone() if torch.equal(value, again[key]) else torch.zeros_like(value)
        for key, value in part.named_parameters(remove_duplicate=False)
    }


def _combined(
    parts: list[nn.Module],
    counterparts: list[list[nn.Module]],
    proportions: list[float],
    starts: list[dict[str, Tensor]] | None,
    ties: _Ties | None,
) -> list[dict[str, Tensor]]:
    """The combined parameters of each part, by name."""
    given = [
        {key: _aligned(key, value, [dict(own.named_parameters(remove_duplicate=False)) for own in owns])
         for key, value in part.named_parameters(remove_duplicate=False)}
        for part, owns in zip(parts, counterparts, strict=True)
    ]  # fmt: skip
    if ties is None or starts is None:
        return [{key: _mean(values, proportions) for key, values in each.items()} for each in given]
    cuts = [_cut(given, starts, task, ties.density) for task in range(len(proportions))]
    return [
        {key: _elected(values, start[key], cuts, proportions, ties.scale) for key, values in each.items()}
        for each, start in zip(given, starts, strict=True)
    ]


def _aligned(key: str, like: Tensor, owns: list[dict[str, Tensor]]) -> list[Tensor]:
    found = [own[key] for own in owns if key in own]
    if len(found) < len(owns) or any(tensor.shape != like.shape for tensor in found):
        shapes = ", ".join(str(tuple(own[key].shape)) if key in own else "none" for own in owns)
        raise VisadaptError(f"the tasks cannot be combined: their tensors {key} have shapes {shapes}")
    return [tensor.detach() for tensor in found]


def _mean(values: Sequence[Tensor], proportions: Sequence[float]) -> Tensor:
    if all(torch.equal(value, values[0]) for value in values):
        return values[0]
    return torch.stack([w * value.double() for w, value in zip(proportions, values, strict=True)]).sum(0)


def _cut(given: list[dict[str, list[Tensor]]], starts: list[dict[str, Tensor]], task: int, density: float) -> float:
    """The magnitude below which a task's differences are set to zero."""
    magnitudes = torch.cat(
        [(values[task].double() - start[key].double()).abs().flatten().cpu()
         for each, start in zip(given, starts, strict=True) for key, values in each.items()]
    )  # fmt: skip
    kept = max(1, round(density * magnitudes.numel()))
    return float(magnitudes.kthvalue(magnitudes.numel() - kept + 1).values)


def _elected(values: list[Tensor], start: Tensor, cuts: list[float], proportions: list[float], scale: float) -> Tensor:
    """θ₀ + λ·τ, with τ the weighted mean of the kept differences whose sign has the larger total."""
    base = start.double()
    differences = torch.stack([value.double() - base for value in values])
    limits = torch.tensor(cuts, dtype=torch.double, device=base.device).view(-1, *[1] * base.ndim)
    trimmed = torch.where(differences.abs() >= limits, differences, 0.0)
    shares = torch.tensor(proportions, dtype=torch.double, device=base.device).view_as(limits)
    sign = (shares * trimmed).sum(0).sign()
    agree = (trimmed.sign() == sign) & (sign != 0)
    total = torch.where(agree, shares.expand_as(trimmed), 0.0).sum(0)
    mean = torch.where(agree, shares * trimmed, 0.0).sum(0) / total.clamp_min(torch.finfo(torch.double).tiny)
    return base + scale * mean


def _buffers(part: nn.Module, owns: list[nn.Module], proportions: list[float]) -> dict[str, Tensor]:
    """The combined buffers of a part that belong to the task: statistics as a mixture, others if they are equal."""
    found: dict[str, Tensor] = {}
    inner = [dict(own.named_modules()) for own in owns]
    for path, module in part.named_modules():
        names = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
        counterparts = [modules[path]._buffers for modules in inner]
        for name in names:
            tensors = [own.get(name) for own in counterparts]
            values = [tensor for tensor in tensors if tensor is not None]
            if len(values) < len(owns):
                continue
            key = f"{path}.{name}" if path else name
            way: Callable[..., Tensor] | None = _STATISTICS.get(name)
            if way is not None and "running_mean" in names:
                found[key] = way(module, counterparts, proportions)
            elif all(torch.equal(value, values[0]) for value in values):
                found[key] = values[0]
            else:
                raise VisadaptError(f"the tasks cannot be combined: their buffers {key} differ, and have no average")
    return found


def _running_mean(module: nn.Module, owns: list[Any], proportions: list[float]) -> Tensor:
    return _mean([own["running_mean"] for own in owns], proportions)


def _running_var(module: nn.Module, owns: list[Any], proportions: list[float]) -> Tensor:
    alike = all(torch.equal(own["running_mean"], owns[0]["running_mean"]) for own in owns)
    if alike or isinstance(module, _InstanceNorm):
        return _mean([own["running_var"] for own in owns], proportions)
    means = [own["running_mean"].double() for own in owns]
    mean = torch.stack([w * value for w, value in zip(proportions, means, strict=True)]).sum(0)
    # within the tasks and between them: no difference of large numbers
    return torch.stack(
        [w * (own["running_var"].double() + (m - mean).square())
         for w, own, m in zip(proportions, owns, means, strict=True)]
    ).sum(0)  # fmt: skip


def _batches(module: nn.Module, owns: list[Any], proportions: list[float]) -> Tensor:
    counts: Tensor = torch.stack([own["num_batches_tracked"] for own in owns]).sum(0)
    return counts


_STATISTICS: dict[str, Callable[..., Tensor]] = {
    "running_mean": _running_mean,
    "running_var": _running_var,
    "num_batches_tracked": _batches,
}
