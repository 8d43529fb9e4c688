"""SSF: a scale and a shift of every layer's features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from visadapt.backbone.site import Site, is_channels_first, rank_of
from visadapt.checks import check_std
from visadapt.methods.layers import in_dtype_of
from visadapt.methods.method import Method
from visadapt.methods.stacking import Own


@dataclass(frozen=True)
class SSF(Method):
    """y = γ⊙x + β after every convolution, linear and norm (Lian et al. 2022, arXiv 2210.08823, §3.2).

    2C parameters per site; it merges into the layer before it. By default (``where="op"``) these are all the
    layers outside the head, found by tracing the backbone's shapes.

    Args:
        init_std: None for γ = 1 and β = 0, where the network starts as it was, bit for bit; a float to draw both with
            that standard deviation around these, as the paper does (0.02).

    Raises:
        VisadaptError: ``init_std`` is out of range; the backbone cannot be traced (give ``inject`` an ``example=``).

    Examples:
        >>> images = torch.randn(2, 3, 32, 32)
        >>> model = visadapt.inject(backbone, visadapt.SSF(), task="flowers", num_classes=3).eval()
        >>> plain = visadapt.merge(model, "flowers")
        >>> torch.allclose(plain(images), model(images), atol=1e-4)
        True
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    where: ClassVar[str] = "op"

    init_std: float | None = None

    def __post_init__(self) -> None:
        check_std(self.init_std)

    def build(self, site: Site, host: nn.Module) -> nn.Module:
        return ScaleShift(site, self.init_std)


class ScaleShift(nn.Module):
    """y = γ⊙x + β over the channels of a site."""

    role: ClassVar[str] = "after"

    def __init__(self, site: Site, std: float | None) -> None:
        super().__init__()
        self.layout = site.layout
        self.gamma = nn.Parameter(torch.ones(site.channels))
        self.beta = nn.Parameter(torch.zeros(site.channels))
        if std is not None:
            nn.init.normal_(self.gamma, 1.0, std)
            nn.init.normal_(self.beta, 0.0, std)

    def forward(self, x: Tensor) -> Tensor:
        ones = [1] * rank_of(self.layout) if is_channels_first(self.layout) else []
        return _scaled(x, self.gamma, self.beta, (-1, *ones))

    def as_affine(self) -> tuple[Tensor, Tensor | None]:
        """(γ, β): diagonal."""
        return self.gamma, self.beta

    def rowwise(self, x: Tensor, own: Own) -> Tensor:
        """The same for a batch whose rows have tensors of their own."""
        n, ones = x.shape[0], [1] * (x.ndim - 2)
        shape = (n, -1, *ones) if is_channels_first(self.layout) else (n, *ones, -1)
        return _scaled(x, own("gamma"), own("beta"), shape)


def _scaled(x: Tensor, gamma: Tensor, beta: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (in_dtype_of(gamma, x) * gamma.view(shape) + beta.view(shape)).to(x.dtype)
