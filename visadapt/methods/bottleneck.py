"""Houlsby's adapter: a small nonlinear bottleneck with a skip connection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import has_torch_function_unary

from visadapt.backbone.autocast import is_autocast
from visadapt.backbone.operators import CONVS
from visadapt.backbone.site import Site, is_channels_first, is_sequence, rank_of
from visadapt.checks import check_choice, check_flag, check_probability, check_std, check_width
from visadapt.errors import VisadaptError, setting
from visadapt.methods.layers import (
    ACTIVATIONS,
    Pointwise,
    as_channels_first,
    drop_rows,
    in_dtype_of,
    is_dense,
    is_hooked,
    is_output_hooked,
    is_recorded,
)
from visadapt.methods.method import Method, later, width
from visadapt.methods.stacking import Own, Single, as_vector, depthwise, pointwise, with_bias


@dataclass(frozen=True)
class Bottleneck(Method):
    """a(h) = h + W2·φ(W1·h + b1) + b2 at every position (Houlsby et al. 2019, arXiv 1902.00751, §2).

    W1: d → m and W2: m → d are 1×1 convolutions where the channels are on axis 1 (series, maps, volumes) and linears
    where they are last (tokens); 2md + d + m parameters per site. By default W2 and b2 are zero, so the network starts
    as it was, bit for bit, and W1 is drawn at the scale of its fan-in, so W2 has a gradient at the first step and W1
    from the second on. With ``init_std`` both are drawn from a normal of that standard deviation, truncated at two of
    them (the paper: 1e-2), and the network starts near itself.

    Adapter+ (Steitz & Roth 2024, arXiv 2406.06820, §3) is h + s ⊙ (W2·φ(W1·h + b1) + b2) behind the MLPs alone, with s
    learned per channel and the branch dropped with probability 0.1:
    ``inject(model, Bottleneck(m=8, init_std=1e-2, scale="channel", drop_path=0.1), where="mlp", norms="frozen")``.

    Args:
        m: width of the bottleneck, or a fraction of each site's channels in (0, 1).
        activation: φ: ``gelu``, ``relu``, ``silu``, ``tanh``, or None for a linear bottleneck, which merges.
        init_std: None for the exact identity; a positive float for the paper's near-identity.
        dropout: probability with which elements of φ(·) are dropped while training.
        scale: None, or ``channel`` for a learned factor per channel on the branch, 1 at the start (d parameters more).
        drop_path: probability with which the whole branch is dropped for a row of the batch (a sample; inside Swin's
            attention a window) while training; what remains is scaled up accordingly.
        depthwise: puts a depthwise convolution, of size 3 along every axis of positions, before φ (series, maps and
            volumes only; on a map 10m parameters more).

    Raises:
        VisadaptError: an option is out of range; ``depthwise`` at a site of token sequences.

    Examples:
        >>> plus = visadapt.Bottleneck(m=4, scale="channel", drop_path=0.1)
        >>> model = visadapt.inject(backbone, plus, task="flowers", num_classes=3, norms="frozen")
        >>> visadapt.summary(model)["flowers"].adapters  # 2dm + 2d + m at each of 8 sites
        1632
    """

    m: int | float = 64
    activation: str | None = "gelu"
    init_std: float | None = None
    dropout: float = 0.0
    depthwise: bool = False
    scale: str | None = later(None)
    drop_path: float = later(0.0)

    def __post_init__(self) -> None:
        check_width(self.m)
        check_choice(self.activation, ACTIVATIONS, "activation")
        check_std(self.init_std)
        check_probability(self.dropout)
        check_flag(self.depthwise, "depthwise")
        check_choice(self.scale, (None, "channel"), "scale")
        check_probability(self.drop_path, "drop_path")

    def build(self, site: Site, host: nn.Module) -> nn.Module:
        if self.depthwise and is_sequence(site.layout):
            raise VisadaptError(f"depthwise=True needs feature maps; {site.full_name} is a token sequence")
        return BottleneckAdapter(self, site)


class BottleneckAdapter(nn.Module):
    """The module of `Bottleneck` at one site; its output has its input's shape, in the site's layout."""

    role: ClassVar[str] = "after"
    overwrites: ClassVar[bool] = True

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
        self.scale = nn.Parameter(torch.ones(site.channels)) if method.scale == "channel" else None
        self.drop_path = method.drop_path

    def forward(self, h: Tensor, fresh: bool = False) -> Tensor:
        """h + W2·φ(W1·h + b1) + b2.

        Args:
            h: the site's tensor.
            fresh: whether nothing else holds ``h``, so that the output may take its memory.
        """
        return self.with_inner(h, fresh)[0]

    def with_inner(self, h: Tensor, fresh: bool = False) -> tuple[Tensor, Tensor]:
        """Compute the output and W1·h + b1: beside ``h`` and the parameters, all that a backward pass needs.

        Args:
            h: the site's tensor.
            fresh: as in `forward`.
        """
        if self._fuses(h):
            return self._fused(h, Single(self), fresh)
        inner: Tensor = self.down(in_dtype_of(self.down.weight, h))
        z = inner
        if self.depthwise is not None:
            z = as_channels_first(self.depthwise, z, self.layout)
        z = F.dropout(self.activation(z), self.dropout, self.training)
        delta: Tensor = self.up(z)
        if self.scale is not None:
            ones = (1,) * rank_of(self.layout) if is_channels_first(self.layout) else ()
            delta = delta * self.scale.view(-1, *ones)
        delta = drop_rows(delta, self.drop_path, self.training)
        # in the branch's own memory, unless a hook holds it
        y = h + delta.to(h.dtype) if is_output_hooked(self.up) else delta.to(h.dtype).add_(h)
        return y, inner

    def _fuses(self, h: Tensor) -> bool:
        """Whether two products, the second added to ``h``, compute it: no conversion, dropout or hook is in between."""
        down = self.down
        if is_recorded() or has_torch_function_unary(h) or not _is_multiplied(h, down.weight):
            return False
        if rank_of(self.layout) and h.ndim != rank_of(self.layout) + 2:
            return False
        drops = self.training and self.drop_path > 0
        hooked = is_hooked(down) or is_hooked(self.up)
        return not (drops or hooked or self.depthwise is not None) and is_dense(h)

    def _fused(self, h: Tensor, own: Own, fresh: bool) -> tuple[Tensor, Tensor]:
        """h + (W2, b2)·(φ(W1·h + b1), 1) and W1·h + b1, with the output written in one pass, in the dtype of h."""
        down, offset, up = own("down.weight", False), own("down.bias", False), with_bias(own, "up.weight", "up.bias")
        if self.scale is not None:
            up = own("scale", False)[:, :, None] * up
        down, offset, up = down.to(h.dtype), offset.to(h.dtype), up.to(h.dtype)

        def act(z: Tensor, axis: int) -> Tensor:
            z = F.dropout(self.activation(z), self.dropout, self.training)
            return torch.cat([z, torch.ones_like(z.narrow(axis, 0, 1))], axis)

        def add(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return x.baddbmm_(a, b) if fresh and not torch.is_grad_enabled() else torch.baddbmm(x, a, b)

        if is_channels_first(self.layout) and h.is_contiguous():
            # one product per row
            x = h.flatten(2)
            down, offset, up = self._spread(own, x, down), self._spread(own, x, offset), self._spread(own, x, up)
            z = torch.baddbmm(offset[:, :, None], down, x)
            return add(x, up, act(z, 1)).view(h.shape), z.view(h.shape[0], down.shape[1], *h.shape[2:])
        # one product per sample: its windows are one long sequence
        last = h.movedim(1, -1) if is_channels_first(self.layout) else h
        x = last.reshape(own.samples, -1, last.shape[-1])
        z = torch.baddbmm(offset[:, None], x, down.transpose(1, 2))
        y = add(x, act(z, 2), up.transpose(1, 2)).view(last.shape)
        z = z.view(*last.shape[:-1], down.shape[1])
        return (y.movedim(-1, 1), z.movedim(-1, 1)) if is_channels_first(self.layout) else (y, z)

    @staticmethod
    def _spread(own: Own, x: Tensor, tensor: Tensor) -> Tensor:
        """Repeat a tensor per sample to one per row of ``x``."""
        rows = x.shape[0]
        if own.samples == 1:
            return tensor.expand(rows, *tensor.shape[1:])
        return tensor if own.samples == rows else tensor.repeat_interleave(rows // own.samples, 0)

    @property
    def is_bare(self) -> bool:
        """Whether it computes only h + W2·φ(W1·h + b1) + b2 in its present mode."""
        drops = self.training and (self.dropout > 0 or self.drop_path > 0)
        return not drops and self.depthwise is None and self.scale is None

    def as_affine(self) -> tuple[Tensor, Tensor]:
        """M = I + s⊙W2·W1 and c = s⊙(W2·b1 + b2) of a linear bottleneck, for merging."""
        if self.activation is not ACTIVATIONS[None]:
            raise VisadaptError(f"its activation is not linear ({setting('activation', None)} would merge)")
        if self.depthwise is not None:
            raise VisadaptError("its depthwise conv looks beyond one position")
        w1, w2 = self.down.weight.double(), self.up.weight.double()
        identity = torch.eye(len(w2), dtype=torch.double, device=w2.device)
        delta, offset = w2 @ w1, w2 @ self.down.bias.double() + self.up.bias.double()  # type: ignore[union-attr]
        if self.scale is not None:
            delta, offset = self.scale.double()[:, None] * delta, self.scale.double() * offset
        return identity + delta, offset

    def rowwise(self, h: Tensor, own: Own, fresh: bool = False) -> Tensor:
        """The same for a batch whose rows have tensors of their own."""
        if self._fuses(h):
            return self._fused(h, own, fresh)[0]
        z = pointwise(own.of("down"), in_dtype_of(own("down.weight"), h), self.layout)
        if self.depthwise is not None:
            z = as_channels_first(lambda maps: depthwise(own.of("depthwise"), maps), z, self.layout)
        z = F.dropout(self.activation(z), self.dropout, self.training)
        delta = pointwise(own.of("up"), z, self.layout)
        if self.scale is not None:
            delta = delta * as_vector(own("scale"), delta, self.layout)
        return drop_rows(delta, self.drop_path, self.training).to(h.dtype).add_(h)


def _is_multiplied(h: Tensor, weight: Tensor) -> bool:
    """Whether products are computed in the dtype of ``h``, without a conversion of it.

    A bf16 backbone's maps are multiplied by fp32 weights that are rounded to bf16, as autocast would do; the sums are
    in fp32, and the result is rounded once. Values in fp16 could overflow, and are converted instead.
    """
    if is_autocast(h.device.type):
        return False
    return h.dtype == weight.dtype or (h.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
