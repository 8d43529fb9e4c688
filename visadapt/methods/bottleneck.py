"""Houlsby's adapter: a small nonlinear bottleneck with a skip connection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visadapt.backbone.operators import CONVS
from visadapt.backbone.site import Site, is_sequence, rank_of
from visadapt.checks import check_choice, check_flag, check_probability, check_std, check_width
from visadapt.errors import VisadaptError
from visadapt.methods.layers import ACTIVATIONS, Pointwise, as_channels_first, in_dtype_of, is_hooked
from visadapt.methods.method import Method, width
from visadapt.methods.stacking import Rows, pointwise


@dataclass(frozen=True)
class Bottleneck(Method):
    """a(h) = h + W2·φ(W1·h + b1) + b2 at every position (Houlsby et al. 2019, arXiv 1902.00751, §2).

    W1: d → m and W2: m → d are 1×1 convolutions where the channels are on axis 1 (series, maps, volumes) and linears
    where they are last (tokens); 2md + d + m parameters per site. By default W2 and b2 are zero, so the network starts
    as it was, bit for bit, and W1 is drawn at the scale of its fan-in, so W2 has a gradient at the first step and W1
    from the second on. With ``init_std`` both are drawn from a normal of that standard deviation, truncated at two of
    them (the paper: 1e-2), and the network starts near itself.

    Args:
        m: width of the bottleneck, or a fraction of each site's channels in (0, 1).
        activation: φ: ``gelu``, ``relu``, ``silu``, ``tanh``, or None for a linear bottleneck, which merges.
        init_std: None for the exact identity; a positive float for the paper's near-identity.
        dropout: probability with which elements of φ(·) are dropped while training.
        depthwise: puts a depthwise convolution, of size 3 along every axis of positions, before φ (series, maps and
            volumes only; on a map 10m parameters more).

    Raises:
        VisadaptError: an option is out of range; ``depthwise`` at a site of token sequences.
    """

    m: int | float = 64
    activation: str | None = "gelu"
    init_std: float | None = None
    dropout: float = 0.0
    depthwise: bool = False

    def __post_init__(self) -> None:
        check_width(self.m)
        check_choice(self.activation, ACTIVATIONS, "activation")
        check_std(self.init_std)
        check_probability(self.dropout)
        check_flag(self.depthwise, "depthwise")

    def build(self, site: Site, host: nn.Module) -> nn.Module:
        if self.depthwise and is_sequence(site.layout):
            raise VisadaptError(f"depthwise=True needs feature maps; {site.full_name} is a token sequence")
        return BottleneckAdapter(self, site)


class BottleneckAdapter(nn.Module):
    """The module of :class:`Bottleneck` at one site; its output has its input's shape, in the site's layout."""

    role: ClassVar[str] = "after"

    def __init__(self, method: Bottleneck, site: Site) -> None:
        super().__init__()
        m = width(method.m, site.channels)
        std = method.init_std
        self.layout = site.layout
        self.activation = ACTIVATIONS[method.activation]
        self.dropout = method.dropout
        self.down = Pointwise(site.channels, m, site.layout, std=site.channels**-0.5 if std is None else std)
        conv = CONVS[rank_of(site.layout) - 1]
        self.depthwise = conv(m, m, 3, padding=1, groups=m) if method.depthwise else None
        self.up = Pointwise(m, site.channels, site.layout, std=0.0 if std is None else std)

    def forward(self, h: Tensor) -> Tensor:
        z = self.down(in_dtype_of(self.down.weight, h))
        if self.depthwise is not None:
            z = as_channels_first(self.depthwise, z, self.layout)
        z = F.dropout(self.activation(z), self.dropout, self.training)
        delta: Tensor = self.up(z)
        # in the branch's own memory, unless a hook holds it
        return h + delta.to(h.dtype) if is_hooked(self.up) else delta.to(h.dtype).add_(h)

    def as_affine(self) -> tuple[Tensor, Tensor]:
        """M = I + W2·W1 and c = W2·b1 + b2 of a linear bottleneck, for merging."""
        if self.activation is not ACTIVATIONS[None]:
            raise VisadaptError("its activation is not linear (activation=None would merge)")
        if self.depthwise is not None:
            raise VisadaptError("its depthwise conv looks beyond one position")
        w1, w2 = self.down.weight.double(), self.up.weight.double()
        identity = torch.eye(len(w2), dtype=torch.double, device=w2.device)
        return identity + w2 @ w1, w2 @ self.down.bias.double() + self.up.bias.double()  # type: ignore[union-attr]

    @staticmethod
    def stacked(adapters: list[BottleneckAdapter], rows: Rows, h: Tensor) -> Tensor:
        """The same for a batch whose rows take the adapters that ``rows`` says."""
        first = adapters[0]
        z = pointwise([a.down for a in adapters], rows, in_dtype_of(first.down.weight, h), first.layout)
        if first.depthwise is not None:
            convs = [cast("nn.Module", a.depthwise) for a in adapters]
            z = rows.join([as_channels_first(conv, rows.take(z, g), first.layout) for g, conv in enumerate(convs)])
        z = F.dropout(first.activation(z), first.dropout, first.training)
        return pointwise([a.up for a in adapters], rows, z, first.layout).to(h.dtype).add_(h)
