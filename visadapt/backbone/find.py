"""Find the sites of a backbone.

Each family has a ``find(model, modules)`` that recognises its blocks by name and type without running the model, and
returns their sites, or none. A new family is one file and one entry in ``FAMILIES``. Families are a shortcut: a
backbone that they do not fully cover is run once on fake tensors, and its sites are read from the dataflow.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from visadapt.backbone import traced
from visadapt.backbone.families import convnext, densenet, mbconv, resnet, transformer, vgg, vit
from visadapt.backbone.heads import Head
from visadapt.backbone.modules import inside, is_matrix, own_modules, within
from visadapt.backbone.site import Site, Sites
from visadapt.backbone.subclass import plain_class
from visadapt.errors import VisadaptError

FAMILIES = (resnet, vgg, transformer, vit, convnext, mbconv, densenet)

# a trace takes about a second, and sites are needed at every inject, load, save and merge
_KNOWN: WeakKeyDictionary[nn.Module, tuple[int, Any, Sites, Head | None]] = WeakKeyDictionary()


def find_sites(
    model: nn.Module, modules: dict[str, nn.Module], head: Head | None, example: Any = None
) -> tuple[Sites, Head | None]:
    """Return all sites of a backbone, sorted by depth, and the head as the trace shows it if there was one.

    Args:
        model: the backbone.
        modules: its modules by path.
        head: its head, if it has one.
        example: an input to trace with, if no family knows the backbone and its input cannot be guessed.

    Raises:
        VisadaptError: no family knows the backbone and it does not run on the example, or on a guessed input.
    """
    looks = hash(tuple((path, plain_class(module), _shapes(module)) for path, module in modules.items()))
    known, kind = _KNOWN.get(model), _kind(example)
    if known is not None and known[0] == looks and (example is None or known[1] == kind):
        return known[2:]
    found = structural(model, modules)
    sites, seen = _sorted(found), None
    if not found or not covers(found, modules, head):
        try:
            sites, seen = traced.find(model, modules, head, example)
        except VisadaptError:
            if not found or example is not None:
                raise
    _KNOWN[model] = (looks, kind, sites, seen)
    return sites, seen


def _kind(example: Any) -> Any:
    """Return what a trace uses of an example: its structure, the shapes and dtypes of its tensors, plain values."""
    leaves, structure = tree_flatten(example)
    return structure, list(map(_kind_of_leaf, leaves))


def _kind_of_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype
    # with its class, as True == 1; anything else may have changed inside, so it is like nothing else
    return (type(leaf), leaf) if isinstance(leaf, bool | int | float | str | None) else object()


def _shapes(module: nn.Module) -> tuple[torch.Size, ...]:
    return tuple(p.shape for p in module._parameters.values() if p is not None)


def structural(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
    """Return the sites that the families find, without running the model."""
    return [site for family in FAMILIES for site in family.find(model, modules)]


def _sorted(found: list[Site]) -> Sites:
    return Sites(sorted(found, key=lambda site: site.depth))


def covers(found: list[Site], modules: dict[str, nn.Module], head: Head | None) -> bool:
    """Whether the blocks with sites are all the repeated blocks of a model; a hybrid has others."""
    known = {site.block for site in found} | set(head.modules if head else ()) - {""}
    seen: set[type[nn.Module]] = set()
    for path, module in modules.items():
        if within(path, known) or isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        if sum(map(is_matrix, own_modules(module).values())) < 2 or any(inside(block, path) for block in known):
            continue
        if not path:
            continue
        if plain_class(module) in seen:
            return False
        seen.add(plain_class(module))
    return True
