"""Task files: one safetensors file per task, with its description and its backbone's fingerprint as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from visadapt.arguments import takes
from visadapt.backbone.facts import Facts
from visadapt.backbone.fingerprint import backbone_tensors, differences, fingerprint, fingerprint_of, is_on_meta
from visadapt.backbone.modules import unwrapped
from visadapt.backbone.site import LAYOUTS, Site, Sites
from visadapt.checks import check_choice, check_num_classes
from visadapt.errors import VisadaptError, nearest
from visadapt.frozen.precision import precision_notes
from visadapt.methods import METHODS
from visadapt.methods.layers import undrawn
from visadapt.methods.method import Method
from visadapt.methods.policy import NORM_POLICIES
from visadapt.plan import commit, device_of, new_plan
from visadapt.reading import check_file
from visadapt.runtime.host import check_free
from visadapt.runtime.measured import measured
from visadapt.runtime.owned import check_nothing_else_trained, check_owned, described, take_up
from visadapt.runtime.quick_walks import load_state
from visadapt.runtime.registry import (
    Registry,
    Task,
    check_filled,
    check_hosts,
    check_task_name,
    facts_of,
    find_registry,
    named_tensors,
    prefix_of,
    registry_of,
)
from visadapt.shape_check import check_shapes, check_tensor
from visadapt.table import Table
from visadapt.tensor_file import Content, read_described, write_described
from visadapt.typed import fits

FORMAT = 1
KIND = "visadapt"


@takes()
def save(model: nn.Module, task: str, path: str | os.PathLike[str], *, notes: Mapping[str, Any] | None = None) -> Path:
    """Write a task to a file, atomically: its own tensors and nothing of the backbone.

    Args:
        model: an injected model.
        task: name of the task.
        path: of the file, such as ``flowers.visadapt``; an existing one is replaced.
        notes: further entries for the file, as JSON values, such as how inputs are prepared. They are added to those
            that the task has already, and come back as ``visadapt.tasks(model)[task].notes``.

    Returns:
        The path.

    Raises:
        VisadaptError: the model has no such task, the notes are not JSON, or the folder cannot be written to; modules
            were replaced or unfrozen after the inject and trained, which the file would leave out.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3, labels=["iris", "lily", "rose"])
        >>> path = visadapt.save(model, "flowers", "flowers.visadapt", notes={"trained by": "me"})
        >>> model = visadapt.eject(model)
        >>> visadapt.load(model, path)
        'flowers'
        >>> visadapt.tasks(model)["flowers"].labels
        ('iris', 'lily', 'rose')
    """
    registry = registry_of(model)
    spec = registry.task(task)
    check_hosts(model, task)
    backbone = unwrapped(model)
    check_nothing_else_trained(backbone, registry, task)
    if is_on_meta(backbone) or any(t.is_meta for t in named_tensors(registry, task).values()):
        raise VisadaptError(f"task {task!r} cannot be saved from the meta device: its model has no values there")
    check_filled(registry, [task])
    tensors = named_tensors(registry, task)
    description = {
        "format": FORMAT,
        "task": spec.name,
        "norms": spec.norms,
        "head": spec.head,
        "num_classes": spec.num_classes,
        **described(spec, tensors, facts_of(backbone).modules),
        "labels": spec.labels,
        "notes": {**_backbone(registry), **precision_notes(registry, task), **spec.notes, **(notes or {})},
        "placements": [
            {
                "method": type(placement.method).__name__,
                "options": placement.method.options(),
                "sites": list(placement.sites),
            }
            for placement in spec.placements
        ],
        # sites that no family knows were traced once; their shapes are kept, so that loading needs no trace
        "traced": {
            name: [site.channels, site.layout, site.depth, list(site.linear), site.norm]
            for name, site in registry.traced.items()
            if any(name in p.sites for p in spec.placements)
        },
        "backbone": fingerprint(backbone, spec.owned, registry.digests),
    }
    if description["traced"]:
        # separate, as earlier versions read "traced" without these
        sites = {name: registry.traced[name] for name in description["traced"]}
        description["blocks"] = {name: [site.block, site.stage] for name, site in sites.items()}
    try:
        json.dumps(description["notes"])
    except (TypeError, ValueError, RecursionError) as error:
        raise VisadaptError(f"the notes of task {task!r} must be JSON: {error}") from error
    write_described(Path(path), KIND, description, tensors)
    return Path(path)


def _backbone(registry: Registry) -> dict[str, Any]:
    """The note that names the backbone, where it was loaded by a name and options that JSON can hold."""
    if registry.source is None:
        return {}
    try:
        build = json.loads(json.dumps(registry.source.build))
        return {"backbone": {"name": registry.source.name, "build": build}}
    except (TypeError, ValueError):
        return {}


@takes()
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    task: str | None = None,
    check: Literal["weights", "shapes"] = "weights",
) -> str:
    """Load a task from a file into a model, injected or not, and activate it.

    Args:
        model: the backbone that the task was trained on.
        path: of the file.
        task: another name for the task.
        check: ``weights``: the backbone must have the very weights that the task was trained on; ``shapes``: only their
            names and shapes (a backbone rounded to another dtype, say).

    Returns:
        The task's name.

    Raises:
        VisadaptError: no such file or not a task file; another backbone (what differs is named); a task of that name is
            there; tensors are missing, unexpected or of another shape. Nothing was changed then.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> path = visadapt.save(model, "flowers", "flowers.visadapt")
        >>> visadapt.load(model, path, task="again")
        'again'
        >>> list(visadapt.tasks(model))
        ['flowers', 'again']
    """
    check_choice(check, ("weights", "shapes"), "check")
    content = read(path)
    description, tensors = content.description, content.tensors
    name = description["task"] if task is None else task
    check_task_name(name)
    registry = find_registry(model)
    backbone = unwrapped(model)
    if registry is not None and name in registry.tasks:
        raise VisadaptError(f"the model has a task {name!r} already: remove it first, or load with task='another-name'")
    check_choice(description["norms"], NORM_POLICIES, "norm policy")
    check_choice(description["head"], ("new", "copy", "frozen"), "head policy")
    check_num_classes(description["num_classes"])
    spec = Task(name, description["norms"], description["head"], description["num_classes"])
    spec.labels = None if description["labels"] is None else tuple(description["labels"])
    if spec.labels is not None and spec.num_classes not in (None, len(spec.labels)):
        raise VisadaptError(f"{path} has {len(spec.labels)} labels for a head of {spec.num_classes} classes")
    if len(set(spec.labels or ())) < len(spec.labels or ()):
        raise VisadaptError(f"{path} has a label twice")
    spec.notes, spec.digest = description["notes"], content.digest
    held = backbone_tensors(backbone, packed=content.digest is not None)
    if any(tensor.is_meta for tensor in held.values()):
        raise VisadaptError(
            f"task {name!r} cannot be loaded into a model on the meta device: load the backbone's weights first"
        )
    digests = {} if registry is None else registry.digests
    facts = facts_of(backbone)
    take_up(spec, description, tensors, facts.modules)
    found = fingerprint_of(held, spec.owned, digests)
    unlike = differences(description["backbone"], found, values=check == "weights")
    if unlike:
        hint = (
            "; check='shapes' loads it all the same" if not differences(description["backbone"], found, False) else ""
        )
        raise VisadaptError(
            f"{path} was trained on another backbone than this {type(backbone).__name__}: {unlike}{hint}"
        )
    check_owned(spec, tensors, facts.modules)
    if registry is None:
        check_free(backbone, facts.modules)
    placements = [
        (_method(path, entry), _sites(facts, entry["sites"], description)) for entry in description["placements"]
    ]
    try:
        built = check_shapes(facts, spec, placements, tensors)
    except VisadaptError as error:
        raise VisadaptError(f"{path}: {error}") from error
    with torch.random.fork_rng(devices=[]), undrawn():
        # values that are drawn here are overwritten: the caller's random state does not change
        plan = new_plan(facts, spec, placements, built)
    _fill(path, facts, plan.parts, tensors)
    commit(facts, plan).digests = digests
    return spec.name


def read(path: str | os.PathLike[str]) -> Content:
    """Read the description and the tensors of a task file.

    Raises:
        VisadaptError: the file does not exist, it is not a task file, or it was changed after it was written.
    """
    check_file(path, "path", "a task file")
    # of a name that is too long, pathlib would raise
    if not os.path.isfile(path):
        siblings = [p.name for p in Path(path).parent.glob("*.visadapt")] if os.path.isdir(Path(path).parent) else []
        raise VisadaptError(f"no file {path}{nearest(Path(path).name, siblings)}")
    content = read_described(Path(path), KIND, "task file")
    description = content.description
    version = description.get("format") if isinstance(description, dict) else None
    if fits(version, int) and version != FORMAT:
        raise VisadaptError(f"{path} has format {version}; this version of visadapt reads {FORMAT}")
    if not fits(version, int) or not _well_formed(description):
        raise VisadaptError(
            f"{path} is not a whole task file: its description lacks an entry or has one of another type"
        )
    return content


def contents(path: str | os.PathLike[str]) -> Table:
    """Describe what a task file holds, as a table; the backbone is not needed.

    Raises:
        VisadaptError: the file does not exist, it is not a task file, or it was changed after it was written.
    """
    content = read(path)
    description, tensors = content.description, content.tensors
    labels = description["labels"]
    notes, scored = description["notes"], measured(description["notes"])
    shown = "–" if labels is None else ", ".join(labels[:12]) + (f", … ({len(labels)})" if len(labels) > 12 else "")
    rows = [
        ("task", description["task"]),
        ("methods", " + ".join(str(_method(path, entry)) for entry in description["placements"])),
        ("sites", f"{sum(len(entry['sites']) for entry in description['placements'])}"),
        ("norms", description["norms"]),
        ("head", description["head"]),
        *((("also trains", ", ".join(description["also"])),) if description.get("also") else ()),
        ("classes", "–" if description["num_classes"] is None else f"{description['num_classes']}"),
        ("labels", shown),
        ("values", f"{sum(tensor.numel() for tensor in tensors.values()):,}"),
        ("size", f"{Path(path).stat().st_size / 1000:,.0f} kB"),
        ("digest", "none (written by an earlier version)" if content.digest is None else f"{content.digest[:16]}…"),
        *([("scored", ", ".join(f"{name} {value}" for name, value in scored.items()))] if scored else []),
        *((key, json.dumps(value)) for key, value in notes.items() if not (key == "metrics" and scored)),
    ]
    return Table(("", str(path)), rows)


_FORM: dict[str, Any] = {
    "task": str,
    "norms": str,
    "head": str,
    "num_classes": int | None,
    "labels": list[str] | None,
    "notes": dict[str, Any],
    "placements": list[dict[str, Any]],
    "traced": dict[str, list[Any]],
    "backbone": dict[str, list[str]],
}

_PLACEMENT: dict[str, Any] = {"method": str, "options": dict[str, Any], "sites": list[str]}

_TRACED: tuple[Any, ...] = (int, str, int, list[str], str)


def _well_formed(description: dict[str, Any]) -> bool:
    """Whether a description has all entries, each of the form that its readers rely on."""

    def has(entry: dict[str, Any], form: dict[str, Any]) -> bool:
        return all(key in entry and fits(entry[key], hint) for key, hint in form.items())

    return (
        has(description, _FORM)
        and fits(description.get("also", []), list[str])
        and fits(description.get("blocks", {}), dict[str, list[str]])
        and all(len(pair) == 2 for pair in description.get("blocks", {}).values())
        and all(has(placement, _PLACEMENT) for placement in description["placements"])
        and all(len(s) == len(_TRACED) and all(map(fits, s, _TRACED)) for s in description["traced"].values())
        and all(s[0] > 0 and s[2] >= 0 for s in description["traced"].values())
        and all(len(pair) == 2 for pair in description["backbone"].values())
    )


def _method(path: Any, entry: dict[str, Any]) -> Method:
    if entry["method"] not in METHODS:
        raise VisadaptError(f"{path} needs a method {entry['method']!r}{nearest(entry['method'], METHODS)}")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["options"].items()}
    try:
        return METHODS[entry["method"]](**options)
    except (TypeError, ArithmeticError) as error:
        raise VisadaptError(f"{path}: {entry['method']} does not take what the file says ({error})") from error


def _sites(facts: Facts, names: list[str], description: dict[str, Any]) -> Sites:
    known = {}
    for name, (channels, layout, depth, linear, norm) in description["traced"].items():
        kind, _, host = name.partition(":")
        # files of earlier versions do not say which block a site is in
        block, stage = description.get("blocks", {}).get(name, ("", ""))
        if host in facts.modules and block in facts.modules and layout in LAYOUTS:
            known[name] = Site(
                host, kind, channels, layout, depth, stage, block, 0, tuple(linear), norm=norm, traced=True
            )
    if any(name not in known for name in names):
        known = {site.full_name: site for site in facts.sites()} | known
    for name in names:
        if name not in known:
            raise VisadaptError(f"this {facts.name} has no site {name!r}{nearest(name, known)}")
    return Sites(known[name] for name in names)


def _fill(path: Any, facts: Facts, parts: list[tuple[str, str, nn.Module]], tensors: dict[str, torch.Tensor]) -> None:
    places = [(prefix_of(host, name, part), part, part.state_dict(keep_vars=True)) for host, name, part in parts]
    # weights that are tied stand at several modules, and in the file under the first's name
    first: dict[int, str] = {}
    devices: dict[str, torch.device] = {}
    for (at, _, state), (host, _, _) in zip(places, parts, strict=True):
        for key, own in state.items():
            name = first.setdefault(id(own), f"{at}{key}")
            if name not in devices:
                devices[name] = device_of(facts.modules[host], facts.model) if own.is_meta else own.device
    expected = {first[id(own)]: own for _, _, state in places for own in state.values()}
    missing = [key for key in expected if key not in tensors]
    extra = [key for key in tensors if key not in expected]
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the task does not"
        raise VisadaptError(f"{path} {what} ({len(missing)} missing, {len(extra)} unexpected tensors)")
    try:
        for key, own in expected.items():
            check_tensor(key, own, tensors)
        _check_dtypes(expected, tensors)
    except VisadaptError as error:
        raise VisadaptError(f"{path}: {error}") from error
    # assigned, not copied into: the file's dtypes are kept. Cloned, because a file's tensors lie at odd addresses, and
    # the kernels that torch picks for these round differently
    values = {name: tensors[name].to(devices[name], copy=True) for name in expected}
    values |= {name: nn.Parameter(values[name]) for name, own in expected.items() if isinstance(own, nn.Parameter)}
    for _, part, state in places:
        load_state(part, {key: values[first[id(own)]] for key, own in state.items()})


def _check_dtypes(expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a mixture of dtypes: a task is kept in one, or in those that its parts have."""
    first: dict[torch.dtype, str] = {}
    for name, own in expected.items():
        other = first.setdefault(own.dtype, name)
        if tensors[name].dtype != tensors[other].dtype:
            raise VisadaptError(f"{name} is {tensors[name].dtype} and {other} is {tensors[other].dtype}")
