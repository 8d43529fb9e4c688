"""DoRA: a low-rank change of a weight's direction, and a magnitude of its own for each output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from visadapt.backbone.operators import Operator, check_weight, operator_of, rows_of
from visadapt.backbone.site import WEIGHT, Site
from visadapt.checks import check_positive, check_width
from visadapt.errors import VisadaptError
from visadapt.methods.layers import truncated_normal_
from visadapt.methods.method import Method, width
from visadapt.methods.stacking import Own


@dataclass(frozen=True)
class DoRA(Method):
    """W̃ = m ⊙ (W + (α/r)·B·A) / ‖W + (α/r)·B·A‖ (Liu et al. 2024, arXiv 2402.09353, §4.1).

    The norm is that of each output channel's weights, for a linear and for a convolution of any geometry; in the
    gradient it is a constant (§4.3). A: r × C_in·k² and B: C_out × r are as in `LoRA`, and m has C_out
    elements: r·(C_in/groups·k² + C_out) + C_out parameters per site. B is zero, A is drawn and m = ‖W‖ at the start:
    the network starts as it was, bit for bit. No operation is added once the weight is formed, and it merges always.

    By default at the sites of `LoRA`: the 3×3 convolutions, and the query and value projections of attention.

    Args:
        r: the rank, or a fraction of the site's channels in (0, 1).
        alpha: α; None for r, that is a scale of 1.

    Raises:
        VisadaptError: an option is out of range; a site is not a convolution or linear, or its weight is not a
            parameter of floating point numbers.

    Examples:
        >>> model = visadapt.inject(backbone, visadapt.DoRA(r=2), task="flowers", num_classes=3).eval()
        >>> images = torch.randn(2, 3, 32, 32)
        >>> torch.allclose(visadapt.merge(model, "flowers")(images), model(images), atol=1e-5)
        True
    """

    kinds: ClassVar[tuple[str, ...]] = ("conv3x3", "query", "value", "qkv", WEIGHT)

    r: int | float = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_width(self.r, "r")
        if self.alpha is not None:
            check_positive(self.alpha, "alpha")

    def build(self, site: Site, host: nn.Module) -> nn.Module:
        operator = operator_of(host, site.full_name)
        check_weight(host, site.full_name)
        weight = host._parameters["weight"]
        assert weight is not None
        if not weight.is_floating_point():
            raise VisadaptError(f"{site.full_name} keeps its weight in {weight.dtype}, which has no magnitude to train")
        return DoRAWeight(self, operator, width(self.r, site.channels), weight.detach())


class DoRAWeight(nn.Module):
    """The module of `DoRA` at one site: A, B and the magnitude m."""

    role: ClassVar[str] = "weights"
    names: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, method: DoRA, operator: Operator, r: int, weight: Tensor) -> None:
        super().__init__()
        self.scale = 1.0 if method.alpha is None else method.alpha / r
        self.transposed = operator.transposed
        rows = rows_of(weight, self.transposed)
        self.a = nn.Parameter(torch.empty(r, rows.shape[1]))
        self.b = nn.Parameter(torch.zeros(operator.outputs, r))
        truncated_normal_(self.a, rows.shape[1] ** -0.5)
        self.magnitude = nn.Parameter(_norm(rows.to(torch.promote_types(weight.dtype, torch.float32))))

    def forward(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        if "weight" not in parameters:
            return {}
        return {"weight": self._changed(parameters["weight"], self.a, self.b, self.magnitude)}

    def rowwise(self, parameters: dict[str, Tensor], own: Own) -> dict[str, Tensor]:
        """The same for a batch whose samples have tensors of their own."""
        a, b, magnitude = (own(name, False) for name in ("a", "b", "magnitude"))
        return {"weight": self._changed(parameters["weight"], a, b, magnitude)} if "weight" in parameters else {}

    def _changed(self, weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
        """W̃, or one per sample where A, B and m are."""
        rows = rows_of(weight, self.transposed).to(torch.promote_types(weight.dtype, a.dtype))
        changed = rows + self.scale * (b @ a)
        norm = _norm(changed.detach())
        # a channel without weights has no direction yet; dividing by its norm would give gradients that are not numbers
        one = torch.ones_like(norm)
        gain = torch.where(norm > 0, magnitude / torch.where(norm > 0, norm, one), one)
        changed = (changed * gain[..., None]).to(weight.dtype)
        return changed.mT if self.transposed else changed.view(*changed.shape[:-2], *weight.shape)


def _norm(rows: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norm
