"""Detect forwards that order the rows of a batch by their data: by sorting, packing, routing or reading numbers."""

from __future__ import annotations

import math
import pickle
import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visadapt.backbone.state import is_index

_MARK = "_visadapt_from_input"
"""Attribute set on tensors that were computed from the model's input or from random numbers."""

_KEPT = "_visadapt_from_model"
"""Attribute set on tensors that were computed from tensors of the model that are not watched for changes."""

_FLOAT = "_visadapt_from_floats"
"""Attribute set on tensors that were computed from the input by way of floating-point numbers."""

_SORTS = {"sort", "topk", "kthvalue", "mode", "argsort", "msort"}
_AT_DIM = {"index_select", "gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce"}
_AT_DIM |= {"index_add", "index_add_", "index_copy", "index_copy_", "index_fill", "index_fill_", "scatter_reduce_"}
_WHOLE = {"masked_select", "take", "put", "put_", "_unique2", "unique_dim", "unique_consecutive", "masked_scatter"}
_READS = {"tolist", "numpy", "__array__", "__dlpack__"}


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records where a forward selects rows by their data, and replaces random numbers by constants.

    Attributes:
        choices: the operators that selected by data, in call order, with the sizes of the axes that they selected
            along.
        numbers: the numbers that Python code read from tensors computed from the input.
        steered: whether Python code read such a number that was computed from floating-point ones, or one of the
            model's that is not watched for changes. Integers tell how long samples are, or whether some are padded; the
            result of a test of values may be another in each batch.
        drew: whether it drew random numbers of Python's or numpy's, which nothing replaces.

    Args:
        inputs: of the forward.
        modules: what may hold generators of random numbers, and tensors whose values may be others in later batches.
    """

    def __init__(self, inputs: Any, modules: Iterable[nn.Module] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.choices: list[tuple[str, tuple[int, ...]]] = []
        self.numbers: list[Any] = []
        self.steered = self.drew = False
        self._reads = _Reads(self)
        self._modules = list(modules)
        # not by an attribute: these may be the model's own
        self._unwatched = {
            id(tensor)
            for module in self._modules
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and not (name in module._buffers and is_index(name, tensor))
        }
        self._others = _Drawn(self._modules)
        for leaf in tree_leaves(inputs):
            mark(leaf)

    def __enter__(self) -> Watch:
        self._others = _Drawn(self._modules)
        self._reads.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._reads.__exit__(*error)  # type: ignore[no-untyped-call]
        self.drew = self._others.put_back()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        marked = any(is_marked(leaf) for leaf in given)
        kept = any(self._is_kept(leaf) for leaf in given)
        if marked:
            self._note(name, args, kwargs)
        out = _drawn(func, name, args, kwargs)
        self.steered = self.steered or (kept and name == "_local_scalar_dense")
        for leaf in tree_leaves(out) if kept and not marked else ():
            if isinstance(leaf, Tensor):
                setattr(leaf, _KEPT, True)
        if name in _DRAWS:
            # a random choice of rows (shuffled batch norm) is another one in the run that counts
            mark(out)
        if marked:
            if name == "_local_scalar_dense":
                self.read(args[0], out)
            floats = any(map(_of_floats, given))
            for leaf in tree_leaves(out):
                mark(leaf)
                if floats and isinstance(leaf, Tensor):
                    setattr(leaf, _FLOAT, True)
            if func._schema.is_mutable:
                for value, argument in zip(args, func._schema.arguments, strict=False):
                    if argument.alias_info is not None and argument.alias_info.is_write:
                        mark(value)
        return out

    def read(self, tensor: Tensor, number: Any) -> None:
        """Record that Python code read a tensor that was computed from the input."""
        self.numbers.append(number)
        self.steered = self.steered or _of_floats(tensor)

    def _is_kept(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and (id(leaf) in self._unwatched or getattr(leaf, _KEPT, False))

    def _selects(self, leaf: Any) -> bool:
        """Return whether an index may differ for another batch of the same shapes."""
        return is_marked(leaf) or self._is_kept(leaf)

    def _note(self, name: str, args: Any, kwargs: Any) -> None:
        """Record an operator that selects along axes of a tensor by values computed from the input."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "_pack_padded_sequence" or (name == "repeat_interleave" and any(map(is_marked, args))):
            self.choices.append((name, (0,)))
        if first is None or not is_marked(first):
            return
        shape = tuple(first.shape)
        sizes: tuple[int, ...] = ()
        if name in _SORTS and first.ndim:
            dims = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, int) and not isinstance(v, bool)]
            # the first number of topk and kthvalue is k; without a number, the last axis is sorted
            dims = dims[1:] if name in ("topk", "kthvalue") else dims
            sizes = (shape[dims[0] if dims else -1],)
        elif name in _AT_DIM and len(args) > 2 and self._selects(args[2]) and first.ndim:
            sizes = (shape[args[1]],)
        elif name in _WHOLE and any(map(self._selects, args[1:2] if len(args) > 1 else args)):
            sizes = shape
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            sizes = _indexed(shape, args[1], self._selects)
        if sizes:
            self.choices.append((name, sizes))


class _Drawn:
    """The generators of random numbers that are not torch's, as they were: Python's, numpy's and those of modules."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._numpy: Any = sys.modules.get("numpy")
        self._own = [each for module in modules for each in module.__dict__.values() if _is_generator(each)]
        self._python = random.getstate()
        self._global = None if self._numpy is None else self._numpy.random.get_state()
        self._states = self._now()

    def _now(self) -> list[bytes]:
        numpy = None if self._numpy is None else self._numpy.random.get_state()
        return [pickle.dumps(state) for state in (random.getstate(), numpy, *self._own)]

    def put_back(self) -> bool:
        """Put the global ones back, and return whether anything was drawn meanwhile."""
        drew = self._now() != self._states
        random.setstate(self._python)
        if self._global is not None:
            self._numpy.random.set_state(self._global)
        return drew


def _is_generator(held: Any) -> bool:
    return isinstance(held, random.Random) or type(held).__module__.startswith("numpy.random")


class _Reads(TorchFunctionMode):
    """Records conversions of whole tensors to Python values, which dispatch no operator."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READS and args and is_marked(args[0]):
            self._watch.read(args[0], args[0].detach().cpu().clone().flatten())
        return func(*args, **(kwargs or {}))


def chose_rows(two: Watch, three: Watch) -> str:
    """Return the name of the operator that may order a batch's rows by their data, or "" if there is none.

    Args:
        two: the record of a forward of two samples.
        three: the record of a forward of three samples made of the same two.
    """
    if two.drew or three.drew:
        return "a random number of Python's"
    if [name for name, _ in two.choices] != [name for name, _ in three.choices]:
        return "an operator that depends on the data"
    for (name, few), (_, more) in zip(two.choices, three.choices, strict=True):
        # an axis that grows with the batch is the batch axis
        if few == (0,) or any(p != q for p, q in zip(few, more, strict=True)):
            return name
    if two.steered or three.steered:
        return "a number that Python reads"
    same = len(two.numbers) == len(three.numbers) and all(map(_alike, two.numbers, three.numbers))
    return "" if same else "a number that Python reads"


def mark(leaf: Any) -> None:
    """Mark a tensor as computed from the input."""
    if isinstance(leaf, Tensor):
        setattr(leaf, _MARK, True)


def is_marked(leaf: Any) -> bool:
    """Return whether a tensor was computed from the input."""
    return isinstance(leaf, Tensor) and getattr(leaf, _MARK, False)


def _of_floats(tensor: Tensor) -> bool:
    return is_marked(tensor) and (tensor.is_floating_point() or getattr(tensor, _FLOAT, False))


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3) or one == other or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


def _indexed(shape: tuple[int, ...], indices: Any, selects: Callable[[Any], bool]) -> tuple[int, ...]:
    """Return the sizes of the axes that are indexed by values that may be others in another batch."""
    sizes: list[int] = []
    axis = 0
    for index in indices:
        wide = index.ndim if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else 1
        if selects(index):
            sizes += shape[axis : axis + wide]
        axis += wide
    return tuple(sizes)


def _drawn(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run an operator with random numbers replaced by constants, the same for every sample and run."""
    if name == "native_dropout":
        return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
    arguments = func._schema.arguments
    for number, argument in enumerate(arguments):
        if argument.name == "dropout_p":
            if number < len(args):
                args = (*args[:number], 0.0, *args[number + 1 :])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
    out = func(*args, **kwargs)
    fill = _DRAWS.get(name)
    return out if fill is None else fill(out)


def _ordered(out: Tensor) -> Tensor:
    return out.copy_(torch.arange(out.numel(), device=out.device).view_as(out))


_DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("bernoulli", "bernoulli_"), lambda out: out.fill_(1)),
    **dict.fromkeys(("rand", "rand_like", "uniform_", "uniform"), lambda out: out.fill_(0.5)),
    **dict.fromkeys(("randn", "randn_like", "normal_", "normal", "randint", "randint_like"), lambda out: out.zero_()),
    **dict.fromkeys(("normal_functional", "exponential_", "random_"), lambda out: out.zero_()),
    "randperm": _ordered,
}
"""Constants in place of random numbers, by operator; a random permutation becomes the identity."""
