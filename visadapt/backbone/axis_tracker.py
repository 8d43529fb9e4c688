"""Channel axes: which axis of each tensor holds the channels, followed operator by operator through one forward.

An operator with a weight establishes the channel axis of its output (a convolution axis 1, a product with a weight the
last). Everything else moves it: a permutation, a reshape that splits heads or cuts windows, a sum, a pooling. What no
rule covers is unknown, not guessed. The operators seen here are torch's own, below every module and function, so that
no layer of any library has to be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visadapt.backbone.axes import (
    Axes,
    Factor,
    agreed,
    axis_of_size,
    axis_size,
    claims,
    cleared,
    established,
    plain,
    regroup,
    resize,
)


class AxisTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows channel axes while a model runs; only what is computed from `start`'s tensors is followed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._axes: dict[int, Axes] = {}
        # kept alive, so that no other tensor gets its id
        self._alive: list[Tensor] = []

    def start(self, tensors: Iterable[Tensor]) -> None:
        """Follow these tensors; nothing is known about their axes yet."""
        for tensor in tensors:
            self._note(tensor, plain(tensor.shape))

    def of(self, tensor: Tensor) -> Axes | None:
        """The axes of a tensor; None if it was not computed from the input."""
        return self._axes.get(id(tensor))

    def forget(self) -> None:
        """Let go of the tensors."""
        self._axes.clear()
        self._alive.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func.namespace != "prim":
            # composite operators then arrive here in one piece
            with self:
                out = func.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
        out = func(*args, **kwargs)
        if any(id(leaf) in self._axes for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)):
            self._follow(func, args, kwargs, out)
        return out

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        schema = func._schema
        named = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        name = schema.name.partition("::")[2]
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        pointwise = torch.Tag.pointwise in func.tags
        reduces = {"dim", "keepdim"} <= {argument.name for argument in schema.arguments}
        # computed before any output is noted: an in-place operator's output is its input
        step = _Step(self, named, reduces)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        results = [step.result(name, pointwise, number, leaf.shape) for number, leaf in enumerate(outputs)]
        for leaf, axes in zip(outputs, results, strict=True):
            self._note(leaf, axes)

    def _note(self, tensor: Tensor, axes: Axes) -> None:
        if id(tensor) not in self._axes:
            self._alive.append(tensor)
        self._axes[id(tensor)] = axes


class _Step:
    """The rules of one operator: from the axes of its inputs to those of its outputs."""

    def __init__(self, tracker: AxisTracker, named: dict[str, Any], reduces: bool) -> None:
        self.tracker = tracker
        self.named = named
        self.reduces = reduces
        self.tensors = [leaf for leaf in tree_leaves(list(named.values())) if isinstance(leaf, Tensor)]
        self.followed = [axes for tensor in self.tensors if (axes := tracker.of(tensor)) is not None]
        self.first = next((value for value in named.values() if isinstance(value, Tensor)), None)

    def axes(self, name: str) -> Axes | None:
        """The axes of an argument; None if it was not computed from the input."""
        value = self.named.get(name)
        return self.tracker.of(value) if isinstance(value, Tensor) else None

    def result(self, name: str, pointwise: bool, number: int, shape: Sequence[int]) -> Axes:
        """The axes of one output.

        Args:
            name: of the operator, without its overload.
            pointwise: whether torch says that it treats every element alike.
            number: of the output.
            shape: of the output.
        """
        axes = self._ruled(name, pointwise, number, tuple(shape))
        fits = axes is not None and [axis_size(axis) for axis in axes] == list(shape)
        return axes if axes is not None and fits else plain(shape)

    def _ruled(self, name: str, pointwise: bool, number: int, shape: tuple[int, ...]) -> Axes | None:
        if name in _RULES:
            return _RULES[name](self, shape)
        if "convolution" in name or name == "deform_conv2d":
            return None if self.axes("weight") else established(self.axes("input"), shape, 1)
        if "batch_norm" in name or name == "native_group_norm":
            return None if number else self._normed_maps(shape)
        if name.startswith("linear") or "grouped_mm" in name:
            # an operator of a quantisation library, whose packed weight is not a tensor; or a matrix per group of rows
            return established(self.followed[0], shape, len(shape) - 1)
        if "rnn" in name or name in ("lstm", "gru"):
            return established(None, shape, len(shape) - 1)
        if pointwise or name in _POINTWISE:
            return self._weighted(agreed(self.followed, shape))
        if self.reduces:
            return self._reduced(shape)
        if name.startswith(_STAYING):
            return self._resized(shape)
        if name.startswith("_scaled_dot_product"):
            query, value = self.axes("query"), self.axes("value")
            return (*resize(query[:-1], shape[:-1]), value[-1]) if number == 0 and query and value else None
        return None

    def _weighted(self, axes: Axes) -> Axes:
        """Keep the last axis alone of heads × width, where a vector of that width scales or shifts it."""
        found = claims(axes)
        size = axis_size(axes[-1]) if axes else 0
        weight = any(t.ndim == 1 and len(t) == size > 1 and self.tracker.of(t) is None for t in self.tensors)
        if weight and len(found) > 1 and len(axes) - 1 in found:
            return (*cleared(axes[:-1]), axes[-1])
        return axes

    def _normed_maps(self, shape: tuple[int, ...]) -> Axes:
        """Channels on axis 1; in an InstanceNorm, a BatchNorm of (1, N·C), that axis holds samples, then channels."""
        source = self.axes("input")
        if source is not None and len(source) == len(shape) and shape[0] == 1:
            flags = [factor.channel for factor in source[1]]
            if any(flags) and not all(flags) and flags == sorted(flags):
                return source
        return established(source, shape, 1)

    def _source(self) -> Axes | None:
        return None if self.first is None else self.tracker.of(self.first)

    def _resized(self, shape: tuple[int, ...]) -> Axes | None:
        """Every axis stays in place; its size may change."""
        source = self._source()
        return resize(source, shape) if source is not None and len(source) == len(shape) else None

    def _reduced(self, shape: tuple[int, ...]) -> Axes | None:
        source, dims = self._source(), self.named.get("dim")
        if source is None:
            return None
        dims = range(len(source)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        gone = {dim % len(source) for dim in dims} if source else set()
        kept = tuple(() if i in gone else axis for i, axis in enumerate(source))
        return kept if len(shape) == len(source) else tuple(axis for i, axis in enumerate(source) if i not in gone)

    def viewed(self, shape: tuple[int, ...]) -> Axes | None:
        source = self._source()
        return None if source is None else regroup(source, shape)

    def permuted(self, shape: tuple[int, ...]) -> Axes | None:
        source = self._source()
        return None if source is None else tuple(source[dim] for dim in self.named["dims"])

    def transposed(self, shape: tuple[int, ...]) -> Axes | None:
        source = self._source()
        if not source:
            return source
        order = list(range(len(source)))
        a, b = self.named.get("dim0", 0) % len(order), self.named.get("dim1", len(order) - 1) % len(order)
        order[a], order[b] = order[b], order[a]
        return tuple(source[i] for i in order)

    def unsqueezed(self, shape: tuple[int, ...]) -> Axes | None:
        source, at = self._source(), self.named["dim"] % len(shape)
        return None if source is None else (*source[:at], (), *source[at:])

    def squeezed(self, shape: tuple[int, ...]) -> Axes | None:
        source, dims = self._source(), self.named.get("dim")
        if source is None or self.first is None:
            return None
        dims = range(len(source)) if dims is None else [dims] if isinstance(dims, int) else dims
        gone = {dim % len(source) for dim in dims if self.first.shape[dim] == 1}
        return tuple(axis for i, axis in enumerate(source) if i not in gone)

    def selected(self, shape: tuple[int, ...]) -> Axes | None:
        source, at = self._source(), self.named.get("dim", 0)
        if source is None:
            return None
        at %= len(source)
        return (*source[:at], *source[at + 1 :])

    def expanded(self, shape: tuple[int, ...]) -> Axes | None:
        source = self._source()
        if source is None:
            return None
        new = len(shape) - len(source)
        return (*plain(shape[:new]), *resize(source, shape[new:]))

    def indexed(self, shape: tuple[int, ...]) -> Axes | None:
        """``x[:, index]``: the indexed axes, next to one another, are replaced by the index's."""
        source, indices = self._source(), self.named["indices"]
        used = [i for i, index in enumerate(indices) if index is not None]
        if source is None or not used or used != list(range(used[0], used[-1] + 1)):
            return None
        taken = sum(i.ndim if i.dtype in (torch.bool, torch.uint8) else 1 for i in indices if i is not None)
        after = source[used[0] + taken :]
        middle = shape[used[0] : len(shape) - len(after)]
        replaced = source[used[0]]
        whole = len(middle) == taken == 1 and bool(replaced) and all(factor.channel for factor in replaced)
        return (*source[: used[0]], *((axis_of_size(size, whole)) for size in middle), *after)

    def written(self, shape: tuple[int, ...]) -> Axes | None:
        """Rows written to a tensor of zeros, as experts do: their last axis is that of the whole."""
        whole = self._resized(shape)
        rows = self.axes("source") or self.axes("values")
        if not rows or (whole and claims(whole)) or claims(rows) != {len(rows) - 1} or axis_size(rows[-1]) != shape[-1]:
            return whole
        return established(whole, shape, len(shape) - 1)

    def joined(self, shape: tuple[int, ...]) -> Axes | None:
        """Concatenated along an axis: it counts channels if it does so in every part that is followed."""
        at = self.named.get("dim", 0) % len(shape)
        parts = [axes for axes in self.followed if len(axes) == len(shape)]
        if not parts:
            return None
        whole = all(bool(axes[at]) and all(factor.channel for factor in axes[at]) for axes in parts)
        others = agreed([(*axes[:at], (), *axes[at + 1 :]) for axes in parts], (*shape[:at], 1, *shape[at + 1 :]))
        return (*others[:at], axis_of_size(shape[at], whole), *others[at + 1 :])

    def stacked(self, shape: tuple[int, ...]) -> Axes | None:
        at = self.named.get("dim", 0) % len(shape)
        others = agreed(self.followed, (*shape[:at], *shape[at + 1 :]))
        return (*others[:at], axis_of_size(shape[at], False), *others[at:])

    def product(self, shape: tuple[int, ...]) -> Axes | None:
        """``a·b``: a weight on the right establishes the last axis; on the left it maps channels to channels."""
        names = [name for name in ("self", "batch1", "mat1", "input") if name in self.named]
        left_name = "mat1" if "mat1" in names else "batch1" if "batch1" in names else names[0]
        right_name = next(name for name in ("mat2", "batch2", "vec2", "vec") if name in self.named)
        left, right = self.axes(left_name), self.axes(right_name)
        if right is None and left is not None:
            return (*cleared(left[:-1]), axis_of_size(shape[-1], True)) if len(shape) == len(left) else None
        if left is None and right is not None and len(shape) == len(right):
            if right[-2] and all(factor.channel for factor in right[-2]):
                return (*cleared(right[:-2]), axis_of_size(shape[-2], True), *cleared(right[-1:]))
            return (*right[:-2], axis_of_size(shape[-2], False), right[-1])
        if left is None or right is None or len(left) != len(right):
            return None
        return (*left[:-1], right[-1])

    def normed(self, shape: tuple[int, ...]) -> Axes | None:
        """A LayerNorm of the last axis with a weight of its width says that it is the channels'."""
        source = self.axes("input")
        if (
            len(shape) > len(source or ())
            or len(self.named["normalized_shape"]) != 1
            or self.named.get("weight") is None
        ):
            return self._resized(shape)
        return established(source, shape, len(shape) - 1)

    def embedded(self, shape: tuple[int, ...]) -> Axes | None:
        return (*plain(shape[:-1]), axis_of_size(shape[-1], self.axes("weight") is None))

    def shuffled(self, shape: tuple[int, ...]) -> Axes | None:
        """Pixels become channels or channels pixels: the channel axis stays the same."""
        source, at = self._source(), len(shape) - 3
        if not source or not source[at] or not all(factor.channel for factor in source[at]):
            return None
        return established(None, shape, at)

    def windowed(self, shape: tuple[int, ...]) -> Axes | None:
        """``x.unfold(dimension, size, step)``: windows along one axis, whose insides are a new, last axis."""
        source, at = self._source(), self.named["dimension"]
        if not source:
            return None
        at %= len(source)
        outer = axis_of_size(shape[at], False)
        return (*source[:at], outer, *source[at + 1 :], axis_of_size(shape[-1], False))

    def unfolded(self, shape: tuple[int, ...]) -> Axes | None:
        """Patches of a map: channels, then the positions in a patch, on one axis."""
        source = self._source()
        if source is None or not source[1] or not all(factor.channel for factor in source[1]):
            return None
        channels = math.prod(factor.size for factor in source[1])
        inner = (*source[1], Factor(shape[1] // channels, False))
        return (source[0], inner, *plain(shape[2:]))

    def folded(self, shape: tuple[int, ...]) -> Axes | None:
        source = self._source()
        if source is None or not source[1] or not source[1][0].channel:
            return None
        return established(None, shape, 1)


_RULES: dict[str, Callable[[_Step, tuple[int, ...]], Axes | None]] = {
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias", "_reshape_copy", "unflatten"), _Step.viewed),
    "permute": _Step.permuted,
    **dict.fromkeys(("transpose", "t", "numpy_T", "mT"), _Step.transposed),
    "unsqueeze": _Step.unsqueezed,
    "squeeze": _Step.squeezed,
    **dict.fromkeys(("select", "unbind"), _Step.selected),
    **dict.fromkeys(("expand", "repeat"), _Step.expanded),
    "index": _Step.indexed,
    **dict.fromkeys(("index_put", "_index_put_impl", "index_add"), _Step.written),
    **dict.fromkeys(("cat", "concat"), _Step.joined),
    "stack": _Step.stacked,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "_addmm_activation"), _Step.product),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _Step.normed),
    "embedding": _Step.embedded,
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _Step.shuffled),
    "unfold": _Step.windowed,
    "im2col": _Step.unfolded,
    "col2im": _Step.folded,
}

_POINTWISE = {
    *("hardswish", "_to_copy", "_prelu_kernel", "native_dropout", "bernoulli", "alias", "detach", "lift_fresh"),
    *("where", "masked_fill", "copy", "logical_not", "dropout", "contiguous", "rrelu_with_noise", "threshold"),
    *("view_as_real_copy", "fill", "zero", "glu_jvp", "softplus", "_conj", "conj_physical"),
    *("celu", "elu", "hardsigmoid", "hardtanh", "leaky_relu", "selu"),
}
"""Elementwise operators that torch, or torch before 2.14, does not tag as such."""

_STAYING = (
    *("max_pool", "avg_pool", "_adaptive_avg_pool", "adaptive_", "upsample", "_upsample", "constant_pad", "pad"),
    *(
        "reflection_pad",
        "replication_pad",
        "slice",
        "split",
        "unsafe_split",
        "narrow",
        "index_select",
        "gather",
        "scatter",
        "flip",
    ),
    *("roll", "_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "grid_sampler", "_fft_"),
    *("sort", "topk", "glu", "chunk", "channel_shuffle", "native_channel_shuffle", "index_put", "index_add", "triu"),
    *("tril", "fractional_max_pool", "index_fill", "index_copy", "linalg_vector_norm", "renorm", "safe_softmax"),
)
"""Prefixes of the names of operators that leave every axis in place and may change its size."""
