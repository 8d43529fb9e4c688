"""Rebuffi's series residual adapter: a 1×1 convolution behind a convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from visadapt.backbone.norms import BATCH_NORMS, scale_and_shift
from visadapt.backbone.site import Site, is_sequence, rank_of
from visadapt.checks import check_choice, check_flag
from visadapt.errors import VisadaptError
from visadapt.methods.layers import Pointwise, as_channels_first, in_dtype_of
from visadapt.methods.method import Method
from visadapt.methods.stacking import Own, batch_norm, pointwise


@dataclass(frozen=True)
class Series(Method):
    """v = u + A·BN1(u) after a convolution's output u (Rebuffi et al. 2017, arXiv 1705.08045, §3.2).

    A is C×C, 1×1, without bias; BN1 adds an affine part: C² + 2C parameters per site. The network's own norm follows,
    as in the paper. By default A = 0: the network starts as it was, bit for bit, and A has a gradient at the first
    step. With ``init="he"``, as the authors draw it for networks pretrained with their adapters in place, a finished
    network starts far from itself and trains badly.

    BN1 belongs to the task alone, whatever its policy for the backbone's norms: it normalises by its batch and keeps
    running statistics while training, and uses these in eval mode; they are in the task's file. (The backbone has no
    statistics for it: with statistics that never move it would be only a scale.) In eval mode the adapter is linear,
    and merges.

    Args:
        norm: whether there is a BN1; without it v = u + A·u and C² parameters.
        init: ``zero``, or ``he`` for He-normal.

    Raises:
        VisadaptError: an option is out of range; ``norm`` at a site of token sequences.

    Examples:
        >>> images = torch.randn(2, 3, 32, 32)
        >>> model = visadapt.inject(backbone, visadapt.Series(), task="flowers", num_classes=3).eval()
        >>> plain = visadapt.merge(model, "flowers")
        >>> torch.allclose(plain(images), model(images), atol=1e-4)
        True
    """

    kinds: ClassVar[tuple[str, ...]] = ("conv3x3",)

    norm: bool = True
    init: str = "zero"

    def __post_init__(self) -> None:
        check_flag(self.norm, "norm")
        check_choice(self.init, ("zero", "he"), "init")

    def build(self, site: Site, host: nn.Module) -> nn.Module:
        if self.norm and is_sequence(site.layout):
            raise VisadaptError(f"Series() normalises feature maps; {site.full_name} is a token sequence: norm=False")
        return SeriesAdapter(self, site)


class SeriesAdapter(nn.Module):
    """The module of `Series` at one site."""

    role: ClassVar[str] = "after"

    def __init__(self, method: Series, site: Site) -> None:
        super().__init__()
        self.layout = site.layout
        self.norm = BATCH_NORMS[rank_of(site.layout) - 1](site.channels) if method.norm else None
        self.project = Pointwise(site.channels, site.channels, site.layout, 0.0, bias=False)
        if method.init == "he":
            nn.init.normal_(self.project.weight, std=(2 / site.channels) ** 0.5)

    def forward(self, u: Tensor) -> Tensor:
        z = in_dtype_of(self.project.weight, u)
        if self.norm is not None:
            z = as_channels_first(self.norm, z, self.layout)
        delta: Tensor = self.project(z)
        return u + delta.to(u.dtype)

    @property
    def is_rowwise(self) -> bool:
        """Whether rows do not depend on each other: BN1 does not normalise by its batch."""
        return self.norm is None or not self.norm.training

    def rowwise(self, u: Tensor, own: Own) -> Tensor:
        """The same for a batch whose rows have tensors of their own."""
        z, norm = in_dtype_of(self.project.weight, u), self.norm
        if norm is not None:
            z = as_channels_first(lambda maps: batch_norm(own.of("norm"), maps, norm.eps), z, self.layout)
        return u + pointwise(own.of("project"), z, self.layout, bias=False).to(u.dtype)

    def as_affine(self) -> tuple[Tensor, Tensor | None]:
        """(I + A·diag(s), A·t), where BN1 is u·s + t in eval mode.

        Raises:
            VisadaptError: it is in train mode.
        """
        a = self.project.weight.double()
        identity = torch.eye(a.shape[0], dtype=a.dtype, device=a.device)
        if self.norm is None:
            return identity + a, None
        if self.norm.training:
            raise VisadaptError("its inner norm uses its batch's statistics in train mode; call eval() first")
        scale, shift = scale_and_shift(self.norm)
        return identity + a * scale, a @ shift
