"""Cached subclasses that change how a module behaves but not what it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

from torch import Tensor, nn

Maker = Callable[[type[nn.Module]], type[nn.Module]]
M = TypeVar("M", bound=Callable[..., type[nn.Module]])


def cached(make: M) -> M:
    """``functools.cache`` for makers of classes: one subclass per class."""
    return cast("M", cache(make))


def _never_trains(module: nn.Module) -> bool:
    return False


def _set_training(module: nn.Module, mode: bool) -> None:
    # remembered, so that an ejected module is in the mode that its parent was last put into
    module.__dict__["training"] = mode


def _rebuild(plain: type[nn.Module], makers: tuple[Any, ...]) -> nn.Module:
    cls = plain
    for make in makers:
        cls = make(cls)
    return cls.__new__(cls)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # the class was made at run time: pickle finds it again by what it was made from
    state = self.__getstate__()  # type: ignore[no-untyped-call]
    return _rebuild, getattr(type(self), "_visadapt_recipe"), state  # noqa: B009


def subclass(plain: type[nn.Module], make: Maker, **members: Any) -> type[nn.Module]:
    """A subclass of the same name that pickle finds again; ``make`` is the cached function that makes it."""
    root, makers = getattr(plain, "_visadapt_recipe", (plain, ()))
    members |= {
        "_visadapt_base": plain,
        "_visadapt_recipe": (root, (*makers, make)),
        "__reduce_ex__": _reduce,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
    }
    return type(plain.__name__, (plain,), members)


@cached
def frozen_class(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass that is always in eval mode, whatever ``.train()`` a parent calls: its statistics stand still."""
    return subclass(plain, frozen_class, training=property(_never_trains, _set_training))


@cached
def widened_class(plain: type[nn.Module]) -> type[nn.Module]:
    """A norm or head in fp32 in a half-precision network: it computes in fp32 and answers in its input's dtype."""

    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return cast("Tensor", plain.forward(self, x.float(), *args, **kwargs)).to(x.dtype)

    return subclass(plain, widened_class, forward=forward)
