"""Modules that the user names: a head, or what a task trains beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from visadapt.arguments import readable
from visadapt.backbone.heads.head import Final, Head, is_final, last_layer
from visadapt.backbone.modules import joined, own_parameters, parent, within
from visadapt.backbone.subclass import plain_class
from visadapt.errors import VisadaptError, nearest
from visadapt.printable import shown


def modules_at(modules: Mapping[str, nn.Module], given: Any, option: str) -> tuple[str, ...]:
    """The modules that a task can own a copy of, by the paths that the user gave.

    A container without a forward (``ModuleList``, ``ModuleDict``) stands for what it holds.

    Args:
        modules: the backbone's modules by path.
        given: a path, or several.
        option: what it was given as, for messages.

    Raises:
        VisadaptError: a path names no module (the nearest is named), the whole model, a module without parameters or
            one that is never called; one module is inside another.
    """
    paths = (given,) if isinstance(given, str) else given
    if not readable(paths, Sequence[str]) or not paths:
        raise VisadaptError(f"{option} must be the path of a module or a list of paths, got {shown(given)}")
    paths = [str.__str__(path) for path in paths]
    found: dict[str, None] = {}
    for path in paths:
        if path not in modules:
            raise VisadaptError(f"{option}: the model has no module {path!r}{nearest(path, modules)}")
        if not path:
            raise VisadaptError(f"{option} must name modules inside the model, got ''; Full() trains a copy of it all")
        found |= dict.fromkeys(_called(modules, path, option))
    for path in found:
        outer = [other for other in found if other != path and within(path, [other])]
        if outer:
            raise VisadaptError(f"{option}: {path} is inside {outer[0]}, which is named too")
    return tuple(found)


def _called(modules: Mapping[str, nn.Module], path: str, option: str) -> list[str]:
    """A module, or those that it holds where it is a container that is never called itself."""
    module = modules[path]
    if not own_parameters(module):
        raise VisadaptError(f"{option}: {path} ({type(module).__name__}) has no parameters")
    holder = modules[parent(path)]
    if isinstance(holder, nn.MultiheadAttention):
        raise VisadaptError(
            f"{option}: {path} is never called, its {type(holder).__name__} reads its weights; name {parent(path)}"
        )
    if plain_class(module).forward is not nn.Module.forward:
        return [path]
    inside = [name for name, child in module._modules.items() if child is not None and own_parameters(child)]
    if not inside:
        raise VisadaptError(f"{option}: {path} ({type(module).__name__}) is never called")
    return [inner for name in inside for inner in _called(modules, joined(path, name), option)]


def head_at(modules: Mapping[str, nn.Module], given: Any, known: Head | None, trace: Callable[[], Head | None]) -> Head:
    """The head that the user names.

    Args:
        modules: the backbone's modules by path.
        given: as `modules_at` takes it.
        known: the head that the library names, if it does.
        trace: finds the layers that make the model's output, None if it does not run; asked only where a module does
            not say which of its layers comes last.

    Returns:
        The head; with an obstacle where it is not known which layers give the logits.

    Raises:
        VisadaptError: as `modules_at`.
    """
    paths = modules_at(modules, given, "head=")
    finals: list[Final] = []
    for path in paths:
        own = [final for final in (known.finals if known else ()) if within(final.path, [path])]
        last = last_layer(path, modules)
        layers = [inner for inner in modules if within(inner, [path]) and is_final(modules[inner])]
        if not own and last is not None:
            own = [Final(last)]
        if not own and len(layers) == 1:
            own = [Final(layers[0])]
        if not own:
            traced = trace()
            own = [final for final in (traced.finals if traced else ()) if within(final.path, [path])]
        if not own:
            return Head(paths, obstacle=f"it is not known which layer of {path} gives the logits: name that layer")
        finals += own
    return Head(paths, tuple(finals))
