"""Choosing sites: what ``where=`` means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from visadapt.backbone.facts import Facts
from visadapt.backbone.modules import parameter_count
from visadapt.backbone.norms import is_norm
from visadapt.backbone.operators import is_linear, is_operator, operator_of
from visadapt.backbone.site import WEIGHT, Site, Sites, Where
from visadapt.backbone.trace import check_input, module_site, trace_flow
from visadapt.errors import VisadaptError, nearest
from visadapt.printable import shown

LAYERS = ("conv", "linear", "norm", "op")


def sites(model: nn.Module, where: Where | None = None, *, example: Any = None) -> Sites:
    """The plan: all sites of a model, or those that ``where`` would choose, before anything changes.

    Args:
        model: a backbone, injected or not.
        where: as `visadapt.inject` takes it; None for all.
        example: an input (a tensor, a tuple of arguments or a dict of keyword arguments), for models whose input
            visadapt cannot guess and sites that have to be traced. Only its shapes and dtypes are used.

    Returns:
        The sites, which print as a table of depth, stage, kind, host, channels, layout.

    Raises:
        VisadaptError: ``where`` matches nothing.

    Examples:
        >>> visadapt.sites(backbone).kinds()
        ['conv3x3', 'block']
        >>> [site.host for site in visadapt.sites(backbone, "block:layer4.*")]
        ['layer4.0.bn2', 'layer4.1.bn2']
    """

    if not isinstance(model, nn.Module):
        raise VisadaptError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    facts = Facts(model)
    if example is not None:
        check_input(example, "example")
    found = facts.sites(example)
    return found if where is None else _select(facts, found, where, tuple(found.kinds()), example)


def select(facts: Facts, where: Where | None, kinds: Sequence[str], example: Any = None) -> Sites:
    """The sites that ``where`` means.

    Args:
        facts: of the backbone.
        where: None (every site of the method's kinds), a kind (``"conv3x3"``), a stage (``"layer3"``), depths (``3``,
            ``range(0, 8)``, ``slice(-4, None)``), a glob over hosts (``"layer3.*"``) or over full names
            (``"conv3x3:layer3.*"``), every ``"conv"``, ``"linear"`` or ``"norm"`` outside the head (``"op"``: all
            three), a predicate on `Site`, or a list of these, whose union is taken.
            Stages, depths and globs mean the sites of the method's kinds there, if it has any there.
        kinds: the method's kinds.
        example: an input to trace modules with that are not sites yet.

    Returns:
        At least one site, in order.

    Raises:
        VisadaptError: something in ``where`` matches nothing; the nearest is named.
    """
    return _select(facts, facts.sites(example), where, kinds, example)


def _select(facts: Facts, found: Sites, where: Where | None, kinds: Sequence[str], example: Any) -> Sites:
    chosen: dict[str, Site] = {}
    for term in terms_of(where):
        for site in _match(facts, found, term, kinds, example):
            chosen[site.full_name] = site
    order = {site.full_name: i for i, site in enumerate(found)}
    return Sites(sorted(chosen.values(), key=lambda s: order.get(s.full_name, len(order))))


def terms_of(where: Any) -> list[Any]:
    """Return what a ``where`` unites, as `select` takes it for any model.

    Raises:
        VisadaptError: it is neither a kind, stage, depth, glob, predicate or site, nor a list of these.
    """
    terms = _listed(where)
    for term in terms:
        known = term is None or isinstance(term, str | range | slice | int | Site) or _is_predicate(term)
        if isinstance(term, bool) or not known:
            raise VisadaptError(f"where= must hold kinds, stages, depths, globs or predicates, got {shown(term, 60)}")
    return terms


def _listed(where: Any) -> list[Any]:
    if isinstance(where, str):
        return [str.__str__(where)]
    if where is None or isinstance(where, range | slice | int | Site) or _is_predicate(where):
        return [where]
    if isinstance(where, Iterable) and not isinstance(where, Tensor | Mapping | nn.Module):
        try:
            terms = list(where)
        except Exception:  # of a stranger's class
            terms = []
        if terms:
            return terms
    raise VisadaptError(
        "where= must be a kind, a stage, a depth or range of depths, a glob, a predicate, or a list of these; "
        f"got {shown(where)}"
    )


def _is_predicate(value: Any) -> bool:
    return callable(value) and not isinstance(value, type | nn.Module)


def _match(facts: Facts, found: Sites, term: Any, kinds: Sequence[str], example: Any) -> list[Site]:
    if isinstance(term, Site):
        known = {site.full_name: site for site in found}
        # one that was traced with an example is in no list, but its host is in the model
        if known.get(term.full_name, term) != term or term.host not in facts.modules:
            raise VisadaptError(f"this {facts.name} has no such site: {term}")
        return [term]
    usual = [site for site in found if site.kind in kinds]
    if term is None:
        _check_complete(found, kinds)
        if not usual:
            hint = f"its kinds of site are {', '.join(found.kinds())}" if found else "visadapt found no site in it"
            raise VisadaptError(
                f"{facts.name} has no site of kind {' or '.join(kinds)}: {hint}; choose with where= (a kind, "
                "or a glob over module names, together with example= if the input is unusual)"
            )
        return usual
    if isinstance(term, str):
        return _match_name(facts, found, term, kinds, example)
    if _is_predicate(term):
        matched = [site for site in found if term(site)]
        what = f"predicate {getattr(term, '__name__', term)!r}"
    else:
        depths = range(1 + max((site.depth for site in usual), default=-1))
        wanted = _depths(term, depths)
        matched = [site for site in usual if site.depth in wanted]
        what = f"{term!r} (depths run from 0 to {len(depths) - 1})"
    if not matched:
        raise VisadaptError(f"where={what} matches no site of {facts.name}")
    return matched


def _depths(term: range | slice | int, depths: range) -> range:
    if isinstance(term, slice):
        return depths[term]
    if isinstance(term, int):
        return depths[term : term + 1 or None] if -len(depths) <= term < len(depths) else range(0)
    return term


def _match_name(facts: Facts, found: Sites, term: str, kinds: Sequence[str], example: Any) -> list[Site]:
    if any(site.kind == term for site in found):
        _check_complete(found, [term])
        return [site for site in found if site.kind == term]
    if term in LAYERS:
        matched = _layers(facts, term, example)
    elif ":" in term:
        matched = [site for site in found if fnmatchcase(site.full_name, term)]
        if not matched and term.startswith("module:"):
            matched = _traced(facts, term.removeprefix("module:"), example)
    else:
        matched = [site for site in found if term == site.stage or fnmatchcase(site.host, term)]
        matched = [site for site in matched if site.kind in kinds] or matched
        if not matched:
            matched = [site for site in found if fnmatchcase(site.block, term)]
            matched = [site for site in matched if site.kind in kinds]
        if not matched:
            matched = _traced(facts, term, example)
    if not matched:
        names = {site.kind for site in found} | {site.stage for site in found if site.stage} | {s.host for s in found}
        names |= {name for name in facts.modules if name}
        raise VisadaptError(f"where={term!r} matches no site and no module of {facts.name}{nearest(term, names)}")
    return matched


def _check_complete(found: Sites, kinds: Sequence[str]) -> None:
    """Refuse to choose all sites of some kinds if places of these kinds were left out."""
    for missing in found.left_out:
        if missing.kind in kinds:
            raise VisadaptError(missing.reason)


def _layers(facts: Facts, term: str, example: Any) -> list[Site]:
    """Every convolution, linear or norm outside the head that is called."""

    def wanted(module: nn.Module) -> bool:
        linear, norm = is_linear(module), is_norm(module)
        is_a = {"conv": isinstance(module, _ConvNd), "linear": linear, "norm": norm}
        return any(is_a.values()) if term == "op" else is_a[term]

    head = facts.look_for_head(example)
    inside = tuple(f"{path}." for path in (() if head is None else head.modules))
    modules = {n: m for n, m in facts.modules.items() if n and wanted(m) and not f"{n}.".startswith(inside)}
    calls = trace_flow(facts.model, example)[0].calls_of() if modules else {}
    called = [name for name in modules if name in calls]
    return [module_site(name, modules[name], depth, calls[name]) for depth, name in enumerate(called)]


def _traced(facts: Facts, glob: str, example: Any) -> list[Site]:

    names = [name for name in facts.modules if name and fnmatchcase(name, glob)]
    return trace_sites(facts.model, names, example) if names else []


def trace_sites(model: nn.Module, names: Sequence[str], example: Any = None) -> list[Site]:
    """Sites at modules of the user's choice, where one forward shows their channels to be.

    They are of kind ``module``, or ``weight`` where other code computes with a module's weight without calling it.

    Args:
        model: the backbone.
        names: paths of modules.
        example: an input; guessed if None.

    Raises:
        VisadaptError: the model does not run; a module is never called, or the channel axis of its output is not
            established or is neither axis 1 nor the last.
    """
    flow, _ = trace_flow(model, example)
    calls = flow.calls_of()
    found = []
    for depth, name in enumerate(names):
        module = model.get_submodule(name)
        if name in flow.read and name not in calls and is_operator(module):
            found.append(weight_site(name, module, depth))
        else:
            found.append(module_site(name, module, depth, calls.get(name, ())))
    return found


def weight_site(name: str, module: nn.Module, depth: int) -> Site:
    """The site at the weight of a convolution or linear that is never called: other code computes with the weight."""
    operator = operator_of(module, name)
    size = parameter_count(module)
    return Site(name, WEIGHT, operator.outputs, operator.layout, depth, block=name, adapts=size, traced=True)
