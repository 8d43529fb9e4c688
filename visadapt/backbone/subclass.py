"""Cached subclasses that change the behaviour of a module, and the chains of classes that they form.

Other libraries swap a module's class too (torch's parametrizations, FSDP2), below ours or on top of it. A class is
therefore added and removed by the function that makes it, never by its position: the chain is rebuilt without it, and
whatever stood on top stays on top. Those of torch's parametrizations always stand on top: torch takes them off again as
the outermost class of a module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, update_wrapper
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.utils import parametrize

from visadapt.errors import VisadaptError

ModuleClass = type[nn.Module]
Maker = Callable[[ModuleClass], ModuleClass]
M = TypeVar("M", bound=Callable[..., ModuleClass])

_RECIPE = "_visadapt_recipe"
_BASE = "_visadapt_base"
_ORIGINAL = "_visadapt_original"


def cached(make: M) -> M:
    """``functools.cache`` for makers of classes: one subclass per class."""
    return cast("M", cache(make))


def _rebuild(plain: ModuleClass, makers: tuple[Maker, ...]) -> nn.Module:
    cls = plain
    for make in makers:
        cls = make(cls)
    return cls.__new__(cls)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    root, makers = getattr(type(self), _RECIPE)
    if _RECIPE not in type(self).__dict__:
        # another library's class is on top: it decides how it is copied and pickled
        return root.__reduce_ex__(self, protocol)
    # the class was made at run time: pickle finds it again by what it was made from
    return _rebuild, (root, makers), getattr(self, "__getstate__", lambda: self.__dict__)()


_COPYING = {"__deepcopy__", "__getnewargs__", "__getnewargs_ex__", "__getstate__", "__reduce__", "__reduce_ex__"}
"""Methods by which a class changes how it is copied."""


@cache
def is_rebuilt_plainly(cls: ModuleClass) -> bool:
    """Whether a copy of a module of this class is a new object with a copy of its ``__dict__``, and nothing else."""
    bases = [base for base in cls.__mro__ if base is not object and vars(base).get("__reduce_ex__") is not _reduce]
    own = [base for base in bases if base is not nn.Module]
    on_top = hasattr(cls, _RECIPE) and _RECIPE not in vars(cls)
    return not on_top and cls.__setstate__ is nn.Module.__setstate__ and not any(_COPYING & vars(c).keys() for c in own)


def _refuse_script(self: nn.Module) -> nn.Module:
    """Called by ``torch.jit.script`` on every module that it is about to compile."""
    raise VisadaptError(
        f"torch.jit.script cannot compile this {type(self).__name__}, whose forward depends on the active task: script "
        "visadapt.merge(model, task) or the model after visadapt.eject(model), or record the active task's forward "
        "with torch.jit.trace or torch.export"
    )


def subclass(plain: ModuleClass, make: Maker, **members: Any) -> ModuleClass:
    """Create a subclass of the same name that pickle can rebuild.

    Args:
        plain: the class to derive from.
        make: the cached function that makes the subclass.
        **members: what differs.
    """
    root, makers = getattr(plain, _RECIPE, (plain, ()))

    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        # transformers' from_pretrained builds another model by this class: it must be a plain one
        self.__class__ = root
        root.__init__(self, *args, **kwargs)

    members |= {
        "__init__": update_wrapper(construct, plain.__init__),
        _BASE: plain,
        _RECIPE: (root, (*makers, make)),
        "__reduce_ex__": _reduce,
        "__prepare_scriptable__": _refuse_script,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
    }
    return type(plain.__name__, (plain,), members)


def plain_class(module: nn.Module) -> ModuleClass:
    """The class that ``module`` had before visadapt swapped it (its own class if it never did)."""
    cls: ModuleClass = getattr(type(module), _RECIPE, (type(module),))[0]
    return cls


def made_by(cls: ModuleClass) -> tuple[Maker, ...]:
    """The makers of a class, from the inside out."""
    makers: tuple[Maker, ...] = getattr(cls, _RECIPE, (cls, ()))[1]
    return makers


def rebuilt(cls: ModuleClass, change: Callable[[ModuleClass], ModuleClass]) -> ModuleClass:
    """Apply ``change`` to visadapt's part of a chain of classes; other libraries' classes stay on top.

    Args:
        cls: the class of a module.
        change: maps the class below all classes that others put on top of visadapt's.
    """
    if not (_is_parametrized(cls) or (hasattr(cls, _RECIPE) and _RECIPE not in cls.__dict__)):
        return change(cls)
    bases = tuple(rebuilt(b, change) if hasattr(b, _RECIPE) or _is_parametrized(cls) else b for b in cls.__bases__)
    members = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    original: ModuleClass = members.setdefault(_ORIGINAL, cls)
    if bases == original.__bases__ and members.keys() - {_ORIGINAL} <= original.__dict__.keys():
        return original
    return cast("ModuleClass", cast("Any", type(cls))(cls.__name__, bases, members))


def _is_parametrized(cls: ModuleClass) -> bool:
    """Whether a class is one that torch made for the parametrizations of one module."""
    return cls.__module__ == parametrize.__name__ and cls.__name__.startswith("Parametrized")


def is_made_by(make: Maker, makers: tuple[Maker, ...]) -> bool:
    """Whether ``make``, which may have its options bound by ``functools.partial``, is one of ``makers``."""
    return make in makers or getattr(make, "func", None) in makers


def without(cls: ModuleClass, *makers: Maker) -> ModuleClass:
    """The class as if none of ``makers`` had ever changed it."""

    def left(own: ModuleClass) -> ModuleClass:
        root, made = getattr(own, _RECIPE, (own, ()))
        kept = [make for make in made if not is_made_by(make, makers)]
        if len(kept) == len(made):
            return own
        cls = cast("ModuleClass", root)
        for make in kept:
            cls = make(cls)
        return cls

    return rebuilt(cls, left)


def founded(cls: ModuleClass, make: Maker) -> ModuleClass:
    """Insert the class that ``make`` makes below all other classes of visadapt."""

    def change(own: ModuleClass) -> ModuleClass:
        root, makers = getattr(own, _RECIPE, (own, ()))
        for each in (make, *makers):
            root = each(root)
        return cast("ModuleClass", root)

    return rebuilt(cls, change)


def stripped(cls: ModuleClass) -> ModuleClass:
    """The class without visadapt's subclasses."""
    return rebuilt(cls, lambda own: getattr(own, _RECIPE, (own,))[0])
