"""Mona: a bottleneck with depthwise convolutions of three sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visadapt.backbone.facts import Facts
from visadapt.backbone.operators import CONVS, convolve
from visadapt.backbone.site import Site, is_channels_first, is_sequence, rank_of
from visadapt.backbone.token_grid import TokenGrid, token_grid
from visadapt.checks import check_choice, check_probability, check_width
from visadapt.errors import VisadaptError
from visadapt.methods.layers import Pointwise, in_dtype_of
from visadapt.methods.method import Method, width
from visadapt.methods.policy import Policy
from visadapt.methods.stacking import Own, as_vector, in_groups, pointwise
from visadapt.printable import shown

_KERNELS = (3, 5, 7)


@dataclass(frozen=True)
class Mona(Method):
    """h + U·GELU(z + P·z), z = y + M∗y, y = D·(γ⊙LN(h) + γx⊙h) (Yin et al. 2025, arXiv 2408.08345, §3.2).

    M is the mean of depthwise 3×3, 5×5 and 7×7 convolutions. D: d → m, P: m → m and U: m → d act at every position, all
    with biases, γ = 10⁻⁶ and γx = 1 at the start: (2m + 5)·d + m² + 88m parameters per site on maps, of which the
    paper's formula omits the 4m biases of P and of the depthwise convolutions, which the authors' code has. On
    series and volumes the convolutions have one or three axes. The paper puts it after each addition of a Swin block;
    here it is at the end of each residual branch, before the addition, as every bottleneck. It is nonlinear
    and does not merge.

    For the convolutions, tokens are arranged on their map, of the size that timm, torchvision or transformers records,
    or ``grid``. Class and register tokens have no neighbours and pass the convolutions unchanged; inside Swin's
    attention each window is a map.

    Args:
        m: width of the bottleneck, or a fraction of each site's channels in (0, 1).
        dropout: probability with which elements of GELU(·) are dropped while training.
        init: ``zero`` for U = 0: the network starts as it was, bit for bit; ``release`` for torch's own init of all
            layers, as in the authors' code: it does not.
        grid: height and width of the map that tokens were cut from, where no library records it; tokens that come
            before those of the map are the rest.

    Raises:
        VisadaptError: an option is out of range; a site has tokens whose map is not known.

    Examples:
        >>> model = visadapt.inject(backbone, visadapt.Mona(m=4), task="flowers", num_classes=3)
        >>> visadapt.summary(model)["flowers"].adapters
        5024
    """

    m: int | float = 64
    dropout: float = 0.1
    init: str = "zero"
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_width(self.m)
        check_probability(self.dropout)
        check_choice(self.init, ("zero", "release"), "init")
        _check_grid(self.grid)

    def build(self, site: Site, host: nn.Module) -> nn.Module:
        return MonaAdapter(self, site, None if self.grid is None else TokenGrid(*self.grid, None))

    def parts(self, backbone: Facts, sites: Sequence[Site], task: Policy) -> Iterable[tuple[str, nn.Module]]:
        for site in sites:
            grid = None if self.grid is None else TokenGrid(*self.grid, None)
            if is_sequence(site.layout) and grid is None:
                grid = token_grid(backbone.modules, site)
                if grid is None:
                    raise VisadaptError(
                        f"Mona convolves over maps; {site.full_name} has tokens, and no map of them is recorded: pass "
                        "grid=(height, width) if they were cut from one"
                    )
            yield site.host, MonaAdapter(self, site, grid)


def _check_grid(grid: Any) -> None:
    if grid is None:
        return
    pair = isinstance(grid, tuple) and len(grid) == 2
    if not pair or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in grid):
        raise VisadaptError(f"grid must be None or (height, width) in tokens, got {shown(grid)}")


class MonaAdapter(nn.Module):
    """The module of `Mona` at one site; its output has its input's shape, in the site's layout."""

    role: ClassVar[str] = "after"

    def __init__(self, method: Mona, site: Site, grid: TokenGrid | None) -> None:
        super().__init__()
        c, m = site.channels, width(method.m, site.channels)
        self.layout = site.layout
        self.rank = 2 if is_sequence(site.layout) else rank_of(site.layout)
        self.grid = grid
        self.dropout = method.dropout
        self.norm = nn.LayerNorm(c)
        self.gamma = nn.Parameter(torch.full((c,), 1e-6))
        self.gamma_x = nn.Parameter(torch.ones(c))
        self.down, self.mix, self.up = _pointwise(c, m, site), _pointwise(m, m, site), _pointwise(m, c, site)
        conv = CONVS[self.rank - 1]
        self.convs = nn.ModuleList(conv(m, m, k, groups=m) for k in _KERNELS)
        if method.init == "zero":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(cast("Tensor", self.up.bias))

    def kernel(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one depthwise convolution that is the mean of the three."""
        convs = [cast("nn.Conv2d", conv) for conv in self.convs]
        weight = _mean_kernel([conv.weight for conv in convs], self.rank)
        return weight, _mean([cast("Tensor", conv.bias) for conv in convs])

    def forward(self, h: Tensor) -> Tensor:
        ones = (1,) * rank_of(self.layout) if is_channels_first(self.layout) else ()
        weight, bias = self.kernel()
        return self._around(
            h,
            lambda name: self.get_parameter(name).view(-1, *ones),
            lambda name, z: self.get_submodule(name)(z),
            lambda z: _depthwise(self.rank, z, weight, bias),
        )

    def _around(
        self,
        h: Tensor,
        vector: Callable[[str], Tensor],
        project: Callable[[str, Tensor], Tensor],
        depthwise: Callable[[Tensor], Tensor],
    ) -> Tensor:
        x = in_dtype_of(self.gamma, h)
        axis = 1 if is_channels_first(self.layout) else -1
        normed = F.layer_norm(x.movedim(axis, -1), (x.shape[axis],), eps=self.norm.eps).movedim(-1, axis)
        normed = normed * vector("norm.weight") + vector("norm.bias")
        y = project("down", normed * vector("gamma") + x * vector("gamma_x"))
        z = y + self._on_map(depthwise, y)
        z = F.dropout(F.gelu(z + project("mix", z)), self.dropout, self.training)
        return h + project("up", z).to(h.dtype)

    def _on_map(self, depthwise: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        """The convolutions' output in the site's layout; zero for tokens that are not on the map."""
        if is_channels_first(self.layout):
            return depthwise(y)
        if not is_sequence(self.layout):
            return depthwise(y.movedim(-1, 1)).movedim(1, -1)
        grid = cast("TokenGrid", self.grid)
        size = grid.height * grid.width
        prefix = y.shape[1] - size if grid.prefix is None else grid.prefix
        if y.ndim != 3 or prefix < 0 or y.shape[1] != prefix + size:
            raise VisadaptError(
                f"the input of Mona must be {grid.prefix or 'any'} tokens and a map of {grid.height}×{grid.width}, "
                f"got a tensor of shape {tuple(y.shape)}: the images have another size than the backbone was made for"
            )
        on_map = y[:, prefix:].reshape(len(y), grid.height, grid.width, -1).movedim(-1, 1)
        flat = depthwise(on_map).flatten(2).transpose(1, 2)
        return F.pad(flat, (0, 0, prefix, 0))

    def as_affine(self) -> tuple[Tensor, Tensor | None]:
        """Refuse: it is nonlinear, and looks beyond one position.

        Raises:
            VisadaptError: always.
        """
        raise VisadaptError("it has a nonlinearity (GELU)")

    def rowwise(self, h: Tensor, own: Own) -> Tensor:
        """The same for a batch whose rows have tensors of their own."""
        kernels = [own(f"convs.{i}.weight") for i in range(len(_KERNELS))]
        weight = _mean_kernel([kernel.flatten(0, 1) for kernel in kernels], self.rank)
        bias = _mean([own(f"convs.{i}.bias") for i in range(len(_KERNELS))])
        return self._around(
            h,
            lambda name: as_vector(own(name), h, self.layout),
            lambda name, z: pointwise(own.of(name), z, self.layout),
            lambda z: in_groups(z, lambda flat: _depthwise(self.rank, flat, weight, bias.flatten())),
        )


def _mean_kernel(kernels: Sequence[Tensor], rank: int) -> Tensor:
    """Depthwise kernels of `_KERNELS`' sizes as one of the largest."""
    return _mean([F.pad(w, ((_KERNELS[-1] - k) // 2,) * 2 * rank) for k, w in zip(_KERNELS, kernels, strict=True)])


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0]) / len(tensors)


def _depthwise(rank: int, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return convolve(rank, z, weight, bias, padding=_KERNELS[-1] // 2, groups=len(weight))


def _pointwise(inputs: int, outputs: int, site: Site) -> Pointwise:
    """A projection with torch's own initial values of a linear."""
    layer = Pointwise(inputs, outputs, site.layout, 0.0)
    bound = inputs**-0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.uniform_(cast("Tensor", layer.bias), -bound, bound)
    return layer
