"""CoLoRA: low-rank changes of neighbouring convolutions that share a factor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from visadapt.backbone.facts import Facts
from visadapt.backbone.operators import Operator, as_kernel, check_weight, convolve, is_operator, operator_of, rows_of
from visadapt.backbone.site import Site
from visadapt.checks import check_flag, check_fraction, check_width
from visadapt.errors import VisadaptError, setting
from visadapt.methods.edge_filter import edge_preserving
from visadapt.methods.layers import in_dtype_of, truncated_normal_
from visadapt.methods.method import Method, width
from visadapt.methods.policy import Policy
from visadapt.methods.stacking import Own, in_groups, pointwise

_ASIDE = ("downsample", "shortcut", "se", "se_module", "attn")


@dataclass(frozen=True)
class CoLoRA(Method):
    """ΔW1 = s1·W2ᵀ·B·A + B1·A1/σ1, ΔW2 = s2·B·A·W1ᵀ + B2·A2/σ2 (Ran et al. 2025, CoLoRA, NeurIPS).

    W1 and W2 are the two pointwise layers of a ConvNeXt block of width d. Were nothing between them, the gradients of
    the loss L in y = W2·W1·x would be W2ᵀ·G and G·W1ᵀ, with one G = (∂L/∂y)·xᵀ: B·A, of rank r_s, stands for it in
    both, beside independent parts of rank r_i. With r = r_s + r_i, s1 = 1/((r_s·d)^¼·(std(W2ᵀ·B) + std(A))),
    s2 = 1/((r_s·d)^¼·(std(A·W1ᵀ) + std(B))) and σ = √r_i·(std(A_i) + std(B_i)), as in the authors' code, all constants
    in the gradient. The depthwise convolution has a branch beside it: 1×1 to d/64 channels, a fixed edge-preserving
    filter (`visadapt.methods.edge_filter.edge_preserving`), and a depthwise 3×3 back to d. All B are zero and all
    A drawn: the network starts as it was, bit for bit. 2·d·r_s + 10·d·r_i parameters per ConvNeXt block of expansion 4,
    and d·(⌊d/64⌋ + 9) of the branch (at least one channel).

    On the bottleneck block of a ResNet the two pointwise layers are W1 and W3, and a k×k convolution W2 is between
    them. The channels of its output differ from those of its input, so W3ᵀ alone would map the block's output to the
    wrong channels. For features that change slowly over positions, W̄2, the sum of its taps, maps between them: ΔW1 =
    s1·(W3·W̄2)ᵀ·B·A + B1·A1/σ1 and ΔW3 = s3·B·A·(W̄2·W1)ᵀ + B3·A3/σ3. W2 has an independent change of rank r_i, and
    no depthwise convolution is added. Blocks of two k×k convolutions have no pointwise pair and are refused.

    Without the branch (``branch=False``), and on ResNets, it merges exactly; the filter depends on its input.

    Args:
        r: the rank r, or a fraction in (0, 1) of the narrower side of W1, which bounds the rank of a change: d in a
            ConvNeXt block, the width of the k×k convolution in a bottleneck block.
        share: fraction of r that is r_s, rounded down.
        branch: whether depthwise convolutions have the branch.

    Raises:
        VisadaptError: an option is out of range; a block is neither a ConvNeXt's nor a ResNet's bottleneck block.

    Examples:
        >>> import timm
        >>> net = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 32, 48, 64), num_classes=10)
        >>> model = visadapt.inject(net, visadapt.CoLoRA(branch=False), task="flowers", num_classes=3).eval()
        >>> images = torch.randn(2, 3, 64, 64)
        >>> torch.allclose(visadapt.merge(model, "flowers")(images), model(images), atol=1e-5)
        True
    """

    kinds: ClassVar[tuple[str, ...]] = ("block",)

    r: int | float = 1 / 16
    share: float = 0.6
    branch: bool = True

    def __post_init__(self) -> None:
        check_width(self.r, "r")
        check_fraction(self.share, "share")
        check_flag(self.branch, "branch")

    def parts(self, backbone: Facts, sites: Sequence[Site], task: Policy) -> Iterable[tuple[str, nn.Module]]:
        for site in sites:
            chain = _chain(backbone, site)
            operators = [operator_of(module, path) for path, module in chain.items()]
            kinds = list(map(_kind, operators))
            paths = list(chain)
            if kinds == ["depthwise", "pointwise", "pointwise"]:
                first, between, last = paths[1], None, paths[2]
            elif kinds == ["pointwise", "dense", "pointwise"]:
                first, between, last = paths
            else:
                raise VisadaptError(
                    "CoLoRA knows blocks of ConvNeXt (depthwise, pointwise, pointwise) and bottleneck blocks of ResNet "
                    f"(pointwise, k×k, pointwise); {site.full_name} has {', '.join(kinds) or 'no convolutions'}"
                )
            if any(one.outputs != other.inputs for one, other in pairwise(operators)):
                raise VisadaptError(
                    "CoLoRA knows blocks whose layers follow one another in the order of their definition; the widths "
                    f"of {', '.join(paths)} do not"
                )
            if between is None and self.branch:
                yield paths[0], DepthwiseBranch(operators[0])
            narrow = operator_of(chain[first], first)
            r = width(self.r, min(narrow.inputs, narrow.outputs))
            shared = int(self.share * r)
            taps = None if between is None else chain[between]
            near = CorrelatedWeight(chain[first], r - shared)
            if shared:
                near.factor = SharedFactor(chain[first], taps, chain[last], shared)
            far = CorrelatedWeight(chain[last], r - shared)
            far._near = (near,)
            yield first, near
            if taps is not None and between is not None:
                yield between, CorrelatedWeight(taps, r - shared)
            yield last, far


def _chain(backbone: Facts, site: Site) -> dict[str, nn.Module]:
    """The convolutions and linears of a block in the order in which they are defined, without its shortcut."""
    found = {}
    for path, module in backbone.modules.items():
        inner = path.removeprefix(f"{site.block}.").split(".")
        if path.startswith(f"{site.block}.") and is_operator(module) and not set(inner) & set(_ASIDE):
            check_weight(module, path)
            found[path] = module
    return found


def _kind(operator: Operator) -> str:
    if not operator.conv or (set(operator.kernel) == {1} and operator.groups == 1):
        return "pointwise"
    if operator.groups == 1:
        return "dense"
    return "depthwise" if operator.groups == operator.inputs == operator.outputs else "grouped"


class CorrelatedWeight(nn.Module):
    """The change of one layer's weight: B_i·A_i/σ_i, and its share of the block's common factor if it has one."""

    role: ClassVar[str] = "weights"
    names: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, host: nn.Module, r: int) -> None:
        super().__init__()
        operator = operator_of(host, type(host).__name__)
        self.transposed = operator.transposed
        rows = rows_of(_frozen(host), self.transposed)
        self.a = nn.Parameter(torch.empty(r, rows.shape[1]))
        self.b = nn.Parameter(torch.zeros(rows.shape[0], r))
        truncated_normal_(self.a, rows.shape[1] ** -0.5)
        self.factor: SharedFactor | None = None
        # the first layer's part, which has the factor; not a child, as it belongs to another host
        self._near: tuple[CorrelatedWeight, ...] = ()

    def forward(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        if "weight" not in parameters:
            return {}
        weight = parameters["weight"]
        sigma = len(self.a) ** 0.5 * (_std(self.a) + _std(self.b))
        delta = self.b @ self.a / sigma
        if self._near and self._near[0].factor is not None:
            delta = delta + self._near[0].factor.far()
        elif self.factor is not None:
            delta = delta + self.factor.near()
        delta = delta.t() if self.transposed else delta.view_as(weight)
        return {"weight": weight + delta.to(weight.dtype)}


class SharedFactor(nn.Module):
    """B·A of a block, as the change of its first and of its last layer."""

    def __init__(self, first: nn.Module, between: nn.Module | None, last: nn.Module, r: int) -> None:
        super().__init__()
        # modules of the backbone, whose frozen weights are read: not children
        self._layers = (first, between, last)
        inputs = rows_of(_frozen(first), _is_transposed(first)).shape[1]
        outputs = rows_of(_frozen(last), _is_transposed(last)).shape[0]
        self.a = nn.Parameter(torch.empty(r, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, r))
        truncated_normal_(self.a, inputs**-0.5)

    def near(self) -> Tensor:
        """s1·(W3·W̄2)ᵀ·B·A, for the first layer."""
        _, between, last = self._layers
        b = self._matrix(last).t() @ self.b
        b = b if between is None else self._matrix(between).t() @ b
        return b @ self.a / self._size(b, self.a)

    def far(self) -> Tensor:
        """s3·B·A·(W̄2·W1)ᵀ, for the last layer."""
        first, between, _ = self._layers
        a = self.a @ self._matrix(first).t()
        a = a if between is None else a @ self._matrix(between).t()
        return self.b @ a / self._size(self.b, a)

    def _size(self, b: Tensor, a: Tensor) -> Tensor:
        size: Tensor = (len(self.a) * len(self.b)) ** 0.25 * (_std(b) + _std(a))
        return size

    def _matrix(self, layer: nn.Module) -> Tensor:
        """A layer's weight as outputs × inputs; of a k×k convolution the sum of its taps."""
        weight = _frozen(layer).detach().to(self.a.dtype)
        matrix: Tensor = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
        return matrix.t() if _is_transposed(layer) else matrix


def _is_transposed(layer: nn.Module) -> bool:
    return operator_of(layer, type(layer).__name__).transposed


def _frozen(layer: nn.Module) -> Tensor:
    """The backbone's own weight of a layer, whichever task is active."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight


def _std(tensor: Tensor) -> Tensor:
    """Standard deviation as a constant, never zero."""
    return tensor.detach().std(correction=0).clamp_min(torch.finfo(tensor.dtype).eps)


class DepthwiseBranch(nn.Module):
    """3×3 ∘ filter ∘ 1×1 beside a depthwise convolution, with ⌊d/64⌋ channels in between."""

    role: ClassVar[str] = "beside"

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        d, self.rank, self.stride = operator.inputs, operator.rank, operator.stride
        r = max(n for n in range(1, max(1, d // 64) + 1) if d % n == 0)
        self.a = nn.Parameter(torch.empty(r, d))
        self.b = nn.Parameter(torch.zeros(d, 1, *(3,) * self.rank))
        truncated_normal_(self.a, d**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        z = convolve(self.rank, in_dtype_of(self.a, x), as_kernel(self.a, self.rank))
        z = edge_preserving(z, self.rank)
        return convolve(self.rank, z, self.b, stride=self.stride, padding=1, groups=len(self.a)).to(x.dtype)

    def rowwise(self, x: Tensor, own: Own) -> Tensor:
        """The same for a batch whose rows have tensors of their own."""
        layout = ("NCL", "NCHW", "NCDHW")[self.rank - 1]
        z = edge_preserving(pointwise(own, in_dtype_of(self.a, x), layout, bias=False, matrix="a"), self.rank)
        b = own("b").flatten(0, 1)
        groups = len(self.a) * x.shape[0]
        y = in_groups(z, lambda flat: convolve(self.rank, flat, b, stride=self.stride, padding=1, groups=groups))
        return y.to(x.dtype)

    def as_kernel(self, host: nn.Module) -> dict[str, Tensor]:
        """Refuse: the filter weighs neighbours by how alike they are.

        Raises:
            VisadaptError: always.
        """
        raise VisadaptError(f"its filter depends on its input ({setting('branch', False)} would merge)")
