"""LoRA: a low-rank change of a weight, for linears and for convolutions of any geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visadapt.backbone.operators import Operator, as_kernel, check_weight, convolve, operator_of, plain_operator
from visadapt.backbone.site import WEIGHT, Site
from visadapt.checks import check_positive, check_probability, check_width
from visadapt.errors import VisadaptError
from visadapt.methods.layers import in_dtype_of, truncated_normal_
from visadapt.methods.method import Method, width
from visadapt.methods.stacking import Own, in_groups, pointwise


@dataclass(frozen=True)
class LoRA(Method):
    """W̃ = W + (α/r)·B·A (Hu et al. 2021, arXiv 2106.09685, §4.1).

    Beside a linear A is r×C_in and B is C_out×r. Beside a convolution A is a k×k convolution C_in → r of the host's
    geometry and B a 1×1 r → C_out: r·(C_in·k² + C_out) parameters. A grouped convolution's weight is, as a matrix,
    C_out × (C_in/groups)·k², and so is B·A: the groups share A, and r·(C_in/groups·k² + C_out) parameters are enough.
    B starts at zero and A drawn: the network starts as it was, bit for bit. It merges always. Where other code computes
    with the weight of a linear without calling it, as in BEiT, that code reads W̃.

    By default at the 3×3 convolutions, and at the query and value projections of attention (or at the one linear that
    computes query, key and value).

    Args:
        r: the rank, or a fraction of the site's channels in (0, 1).
        alpha: α; None for r, that is a scale of 1.
        dropout: probability with which elements of the adapter's input are dropped while training.

    Raises:
        VisadaptError: an option is out of range; a site is not a convolution or linear.

    Examples:
        >>> images = torch.randn(2, 3, 32, 32)
        >>> model = visadapt.inject(backbone, visadapt.LoRA(r=4), task="flowers", num_classes=3).eval()
        >>> plain = visadapt.merge(model, "flowers")
        >>> torch.allclose(plain(images), model(images), atol=1e-4)
        True
    """

    kinds: ClassVar[tuple[str, ...]] = ("conv3x3", "query", "value", "qkv", WEIGHT)

    r: int | float = 8
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_width(self.r, "r")
        if self.alpha is not None:
            check_positive(self.alpha, "alpha")
        check_probability(self.dropout)

    def build(self, site: Site, host: nn.Module) -> nn.Module:
        operator, r = operator_of(host, site.full_name), width(self.r, site.channels)
        if site.kind != WEIGHT:
            return LoRAAdapter(self, operator, r)
        check_weight(host, site.full_name)
        if self.dropout:
            raise VisadaptError(
                f"dropout must be 0 at {site.full_name}, which is never called: no input of it can be dropped"
            )
        return LoRAWeight(self, operator, r)


class LoRAAdapter(nn.Module):
    """The module of `LoRA` at one site."""

    role: ClassVar[str] = "beside"

    def __init__(self, method: LoRA, operator: Operator, r: int) -> None:
        super().__init__()
        self.operator = operator
        self.scale = 1.0 if method.alpha is None else method.alpha / r
        self.dropout = method.dropout
        inputs = operator.inputs // operator.groups
        self.a = nn.Parameter(torch.empty(r, inputs, *(operator.kernel if operator.conv else ())))
        self.b = nn.Parameter(torch.zeros(operator.outputs, r))
        truncated_normal_(self.a, self.a[0].numel() ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        z = F.dropout(in_dtype_of(self.a, x), self.dropout, self.training)
        groups = self.operator.groups
        if not self.operator.conv:
            z = F.linear(F.linear(z, self.a), self.b)
        else:
            # N × groups·r: the one A applied to each group
            z = self.operator.apply(z, self.a.repeat(groups, *(1,) * (self.a.ndim - 1)), groups=groups)
            z = convolve(self.operator.rank, z, as_kernel(self.b, self.operator.rank), groups=groups)
        return (z * self.scale).to(x.dtype)

    def rowwise(self, x: Tensor, own: Own) -> Tensor:
        """The same for a batch whose rows have tensors of their own."""
        z = F.dropout(in_dtype_of(self.a, x), self.dropout, self.training)
        operator, groups = self.operator, self.operator.groups
        if not operator.conv:
            z = pointwise(own, z, operator.layout, bias=False, matrix="a")
        else:
            kernel = own("a").repeat(1, groups, *(1,) * (self.a.ndim - 1)).flatten(0, 1)
            z = in_groups(z, lambda flat: operator.apply(flat, kernel, groups=groups * x.shape[0]))
        if groups == 1:
            z = pointwise(own, z, operator.layout, bias=False, matrix="b")
        else:
            b = as_kernel(own("b").flatten(0, 1), operator.rank)
            z = in_groups(z, lambda flat: convolve(operator.rank, flat, b, groups=groups * x.shape[0]))
        return (z * self.scale).to(x.dtype)

    def as_kernel(self, host: nn.Module) -> dict[str, Tensor]:
        """(α/r)·B·A in the shape of the host's weight.

        Raises:
            VisadaptError: the host's forward does more than apply its weight.
        """
        operator = plain_operator(host, type(host).__name__)
        delta = self.scale * (self.b @ self.a.flatten(1))
        if operator.transposed:
            return {"weight": delta.t()}
        return {"weight": delta.view(operator.outputs, *self.a.shape[1:])}


class LoRAWeight(nn.Module):
    """The module of `LoRA` at a weight that other code computes with, without calling the host."""

    role: ClassVar[str] = "weights"
    names: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, method: LoRA, operator: Operator, r: int) -> None:
        super().__init__()
        self.scale = 1.0 if method.alpha is None else method.alpha / r
        self.transposed = operator.transposed
        inputs = operator.inputs // operator.groups
        self.a = nn.Parameter(torch.empty(r, inputs, *operator.kernel))
        self.b = nn.Parameter(torch.zeros(operator.outputs, r))
        truncated_normal_(self.a, self.a[0].numel() ** -0.5)

    def forward(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        if "weight" not in parameters:
            return {}
        weight = parameters["weight"]
        delta = self.scale * (self.b @ self.a.flatten(1))
        return {"weight": weight + (delta.t() if self.transposed else delta.view_as(weight)).to(weight.dtype)}
