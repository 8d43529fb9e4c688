"""Sizes for which a model does the same: the conditions that its code tests, found on tensors of symbolic sizes.

A copy of the backbone runs once on fake tensors whose sizes are symbols. Each comparison of sizes, in Python or in an
operator, becomes a condition such as ``n % 3 == 0``. For all sizes that satisfy these conditions the same operators
run, with sizes in proportion, so facts about the order of rows hold for all of them. No rules are made of a model that
moves rows by amounts that depend on sizes, or that does not run on such tensors.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import SymInt, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visadapt.backbone.batch import Axis, Key, is_cache, leaves, mapped
from visadapt.backbone.caches import NotedFakes, forget_fakes
from visadapt.backbone.entry import Entry
from visadapt.backbone.modules import unwrapped
from visadapt.backbone.reordering import is_marked, mark
from visadapt.backbone.twin import examining, twin_of

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

_SHAPING = {"view", "reshape", "_unsafe_view", "_reshape_alias", "expand", "repeat", "arange", "zeros", "ones", "full"}
_SHAPING |= {"empty", "new_zeros", "new_ones", "new_full", "new_empty", "rand", "randn", "empty_strided", "as_strided"}
_SHAPING |= {"as_strided_", "native_group_norm", "empty_like", "resize_", "new_empty_strided", "scalar_tensor"}
_SHAPING |= {"randint"}
"""Operators that may take numbers in proportion to N: sizes, and ends of ranges from 0."""

_CUTTING = {"slice", "select", "narrow", "split", "split_with_sizes", "unsafe_split", "unfold"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_AT_DIM = {"index_select", "gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_"}
_AT_DIM |= {"index_copy", "index_copy_", "index_fill", "index_fill_", "scatter_reduce", "scatter_reduce_"}
_SAME_ORDER = {"view", "unsqueeze", "squeeze", "expand", "alias", "detach", "_to_copy", "clone", "lift_fresh"}

_NUMBERS = "_visadapt_numbers_of_samples"
"""Attribute of tensors that hold the numbers 0, 1, … in their order, so that they move nothing as an index."""


_LONGEST = 10.0
"""Seconds of computing after which the search for conditions ends."""


def _symbolic_shapes() -> Any:
    # imports sympy, which takes most of a second, in programs without mixed batches as well
    return import_module("torch.fx.experimental.symbolic_shapes")


class _UnruledError(Exception):
    """Rows are moved by amounts that depend on sizes, or the search takes too long."""


@dataclass(frozen=True)
class SizeRules:
    """Conditions on the sizes of a batch.

    Attributes:
        symbols: of each axis of each tensor, by path; the size itself where it is fixed.
        others: what the batch holds beside tensors, by path.
        conditions: expressions of these symbols, which are to be true.
    """

    symbols: Mapping[Key, tuple[Any, ...]]
    others: Mapping[Key, Any]
    conditions: tuple[Any, ...]

    def hold(self, given: Any) -> bool:
        """Return whether a batch satisfies the conditions."""
        values: dict[Any, int] = {}
        for key, leaf in leaves(given):
            if not isinstance(leaf, Tensor):
                if key not in self.others or self.others[key] != _plain(leaf):
                    return False
                continue
            symbols = self.symbols.get(key, ())
            if len(symbols) != leaf.ndim:
                return False
            for symbol, size in zip(symbols, leaf.shape, strict=True):
                if isinstance(symbol, int):
                    if symbol != size:
                        return False
                elif size < 2:
                    return False
                else:
                    values[symbol] = int(size)
        return all(bool(condition.xreplace(values) == True) for condition in self.conditions)  # noqa: E712


def find_rules(model: nn.Module, given: tuple[Any, Any], cut: Mapping[Key, Axis], entry: Entry) -> SizeRules | None:
    """Find the conditions under which a model treats batches as it treats this one.

    Args:
        model: the backbone, injected or not; neither it nor the batch is changed.
        given: ``(args, kwargs)`` of its call.
        cut: where the samples lie, by path.
        entry: the method that is called with the batch.

    Returns:
        None if the model does not run on tensors of symbolic sizes, or if what it does to rows depends on sizes in
        another way than by conditions.
    """
    if any(is_cache(leaf) or not isinstance(cut.get(key, 0), int) for key, leaf in leaves(given)):
        return None
    environment: ShapeEnv = _symbolic_shapes().ShapeEnv(duck_shape=False)
    fake = NotedFakes(shape_env=environment)
    try:
        return _found(model, given, cut, entry, environment, fake)
    except Exception:  # whatever a model may raise on fake tensors
        return None
    finally:
        if fake.are_held():
            forget_fakes()


def _found(
    model: nn.Module, given: Any, cut: Mapping[Key, Axis], entry: Entry, environment: ShapeEnv, fake: FakeTensorMode
) -> SizeRules:
    dynamic = _symbolic_shapes().DimDynamic
    batch: set[Any] = set()
    symbols: dict[Key, tuple[Any, ...]] = {}
    others: dict[Key, Any] = {}

    def faked(key: Key, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            others[key] = _plain(leaf)
            return leaf
        free = [dynamic.DYNAMIC if size > 1 else dynamic.STATIC for size in leaf.shape]
        context = _symbolic_shapes().StatelessSymbolicContext(dynamic_sizes=free)
        made = fake.from_tensor(leaf.detach(), symbolic_context=context)
        mark(made)
        symbols[key] = tuple(size.node.expr if isinstance(size, SymInt) else int(size) for size in made.shape)
        axis = cut.get(key)
        if isinstance(axis, int) and not isinstance(symbols[key][axis], int):
            batch.add(symbols[key][axis])
        return made

    args, kwargs = mapped(faked, given)
    twin = twin_of(unwrapped(model))
    with examining(twin), fake, _Rows(environment, batch):
        entry.of(twin)(*args, **kwargs)
    return SizeRules(symbols, others, tuple(guard.expr for guard in environment.guards))


def _plain(leaf: Any) -> Any:
    return leaf if leaf is None or isinstance(leaf, bool | int | float | str) else type(leaf)


def _counts(name: str, args: Any) -> bool:
    """Return whether an operator gives the numbers 0, 1, … in their order."""
    if name == "arange":
        return len(args) == 1 or (args[0] == 0 and args[2:] in ((), (1,)))
    if not args or not getattr(args[0], _NUMBERS, False):
        return False
    return name in _SAME_ORDER or (name == "slice" and args[2:3] in ((), (0,), (None,)) and args[4:] in ((), (1,)))


class _Rows(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operators that move rows by amounts that depend on sizes.

    Args:
        environment: of the symbols.
        batch: the symbols that stand for N.
    """

    def __init__(self, environment: ShapeEnv, batch: set[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._environment, self._batch = environment, batch
        self._end = time.thread_time() + _LONGEST

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        given = tree_leaves((args, kwargs))
        self._check(name, args, given)
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
        if any(map(is_marked, tensors)):
            for leaf in tree_leaves(out):
                mark(leaf)
        elif _counts(name, args):
            setattr(out, _NUMBERS, True)
        return out

    def _check(self, name: str, args: Any, given: list[Any]) -> None:
        sizes = [leaf for leaf in given if isinstance(leaf, SymInt)]
        own = [self._number(size) for size in sizes]
        if time.thread_time() > self._end:
            raise _UnruledError(name)
        if any(n is None for n in own) or (any(own) and name not in _SHAPING | _CUTTING):
            raise _UnruledError(name)
        if sizes and (name == "roll" or (name in _CUTTING and self._along_samples(args) and not all(own))):
            raise _UnruledError(name)
        for index in self._along(name, args):
            if isinstance(index, Tensor) and not is_marked(index) and not getattr(index, _NUMBERS, False):
                raise _UnruledError(name)

    def _along(self, name: str, args: Any) -> list[Any]:
        """Return the indices of an operator that select along an axis of samples."""
        if name in _INDEXING:
            return [index for axis, index in enumerate(args[1]) if self._along_samples((args[0], axis))]
        return list(args[2:]) if name in _AT_DIM and self._along_samples(args) else []

    def _number(self, size: SymInt) -> bool | None:
        """Return whether a size is in proportion to N; None if it depends on N otherwise."""
        expr = self._environment.replace(size.node.expr).expand()
        inside = [symbol for symbol in self._batch if self._environment.replace(symbol) in expr.free_symbols]
        if not inside:
            return False
        n = self._environment.replace(inside[0])
        factor = expr.coeff(n)
        rest = (expr - factor * n).expand()
        return True if rest == 0 and n not in factor.free_symbols else None

    def _along_samples(self, args: Any) -> bool:
        tensor, dim = args[0], args[1] if len(args) > 1 and type(args[1]) is int else 0
        if not isinstance(tensor, Tensor) or not tensor.ndim:
            return False
        size = tensor.shape[dim]
        return isinstance(size, SymInt) and self._number(size) is not False
