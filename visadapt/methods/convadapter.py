"""Conv-Adapter: a depthwise-separable bottleneck of convolutions, in four schemes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visadapt.backbone.facts import Facts
from visadapt.backbone.operators import CONVS, Operator, as_kernel, convolve, operator_of
from visadapt.backbone.site import Site, is_channels_first, is_sequence, rank_of
from visadapt.checks import check_choice, check_count
from visadapt.errors import VisadaptError
from visadapt.methods.layers import as_channels_first, in_dtype_of
from visadapt.methods.method import Method
from visadapt.methods.policy import Policy
from visadapt.methods.slot import Slot
from visadapt.methods.stacking import Own, as_vector, in_groups, pointwise

SCHEMES = ("conv-parallel", "conv-sequential", "residual-parallel", "residual-sequential")


@dataclass(frozen=True)
class ConvAdapter(Method):
    """Δ(x) = s⊙(W2∗ReLU(W1∗x + b1) + b2) (Chen et al. 2022, arXiv 2208.07463, §3.2).

    W1 is a k×k convolution C_in → C_in/γ in C_in/γ groups, W2 a 1×1 C_in/γ → C_out, s a scale per channel, 1 at the
    start: C_in·k² + (C_in/γ)·(1 + C_out) + 2·C_out parameters per site. k is the adapted conv's, 3 at a residual
    branch. The schemes say where (§3.3):

    * ``conv-parallel``: W∗x + Δ(x), at each 3×3 convolution (what the authors released);
    * ``conv-sequential``: u + Δ(u), behind each 3×3 convolution;
    * ``residual-parallel``: F(x) + Δ(x), beside each residual branch F, before the addition;
    * ``residual-sequential``: F(x) + Δ(F(x)), at the end of each residual branch.

    By default W2 = b2 = 0: the network starts as it was, bit for bit. It is nonlinear and does not merge.

    Args:
        gamma: γ, the factor by which the bottleneck is narrower.
        scheme: where it stands.
        init: ``zero``, or ``release`` for torch's own init of both convolutions, as the authors' code has it, with
            which the network does not start as it was.

    Raises:
        VisadaptError: an option is out of range; a site is not a convolution, or is one of token sequences; a site of
            ``residual-parallel`` is not a block of several modules.

    Examples:
        >>> images = torch.randn(2, 3, 32, 32)
        >>> expected = backbone.eval()(images)
        >>> model = visadapt.inject(backbone, visadapt.ConvAdapter(gamma=2), task="flowers")
        >>> torch.equal(model(images), expected)
        True
        >>> visadapt.summary(model)["flowers"].sites
        16
    """

    kinds: ClassVar[tuple[str, ...]] = ("conv3x3",)

    gamma: int = 4
    scheme: str = "conv-parallel"
    init: str = "zero"

    def __post_init__(self) -> None:
        check_count(self.gamma, "gamma")
        check_choice(self.scheme, SCHEMES, "scheme")
        check_choice(self.init, ("zero", "release"), "init")
        object.__setattr__(self, "kinds", ("block",) if self.scheme.startswith("residual") else ("conv3x3",))

    def build(self, site: Site, host: nn.Module) -> nn.Module:
        if is_sequence(site.layout):
            raise VisadaptError(f"ConvAdapter needs feature maps; {site.full_name} is a token sequence")
        c = site.channels
        if self.scheme == "conv-parallel":
            operator = operator_of(host, site.full_name)
            if not operator.conv:
                raise VisadaptError(f"conv-parallel stands beside convolutions; {site.full_name} is a linear")
            return ConvBeside(self, operator.inputs, c, operator)
        if self.scheme == "conv-sequential":
            kernel = operator_of(host, site.full_name).kernel
            return ConvAfter(self, c, c, _same(c, kernel), site.layout)
        return ConvAfter(self, c, c, _same(c, (3,) * rank_of(site.layout)), site.layout)

    def parts(self, backbone: Facts, sites: Sequence[Site], task: Policy) -> Iterable[tuple[str, nn.Module]]:
        if self.scheme != "residual-parallel":
            yield from super().parts(backbone, sites, task)
            return
        taken: set[str] = set()
        for site in sites:
            block = backbone.modules[site.block]
            if is_sequence(site.layout) or site.block == site.host or site.block in taken:
                raise VisadaptError(
                    f"residual-parallel needs the input of a residual branch of feature maps; {site.full_name} has none"
                )
            taken.add(site.block)
            rank = rank_of(site.layout)
            convs = [m for m in block.modules() if isinstance(m, CONVS[rank - 1])]
            if not convs:
                raise VisadaptError(
                    f"residual-parallel reads the width of a branch's input off its first convolution; {site.block} "
                    "has none"
                )
            inputs = convs[0].in_channels
            slot = Slot()
            yield site.block, Tap(slot)
            yield site.host, BranchAdapter(self, inputs, site.channels, _same(inputs, (3,) * rank), site.layout, slot)


def _same(channels: int, kernel: tuple[int, ...]) -> Operator:
    ones = (1,) * len(kernel)
    padding = tuple(k // 2 for k in kernel) if all(k % 2 for k in kernel) else None
    return Operator(channels, channels, len(kernel), kernel, ones, ones, padding)


class ConvBottleneck(nn.Module):
    """Δ, at the geometry of an operator."""

    def __init__(
        self, method: ConvAdapter, inputs: int, outputs: int, operator: Operator, layout: str | None = None
    ) -> None:
        super().__init__()
        narrow = max(1, inputs // method.gamma)
        # where γ does not divide the channels, the groups are as many as divide both
        self.groups = math.gcd(inputs, narrow)
        self.operator = operator
        self.layout = operator.layout if layout is None else layout
        conv = CONVS[operator.rank - 1]
        self.down = conv(inputs, narrow, operator.kernel, groups=self.groups)  # type: ignore[arg-type]
        self.up = conv(narrow, outputs, 1)
        self.scale = nn.Parameter(torch.ones(outputs))
        if method.init == "zero":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]

    def change(self, x: Tensor, stride: tuple[int, ...] | None = None) -> Tensor:
        """Δ(x), with another stride than the operator's if one is given."""

        def delta(z: Tensor) -> Tensor:
            z = self.operator.apply(z, self.down.weight, self.down.bias, self.groups, stride)
            scale = self.scale
            kernel = self.up.weight * as_kernel(scale[:, None], self.operator.rank)
            return convolve(self.operator.rank, F.relu(z), kernel, self.up.bias * scale)  # type: ignore[operator]

        return as_channels_first(delta, in_dtype_of(self.scale, x), self.layout).to(x.dtype)

    def change_rowwise(self, x: Tensor, own: Own, stride: tuple[int, ...] | None = None) -> Tensor:
        """Δ(x) of a batch whose rows have tensors of their own."""
        kernel, bias = own("down.weight").flatten(0, 1), own("down.bias").flatten()
        operator, groups = self.operator, self.groups * x.shape[0]

        def delta(z: Tensor) -> Tensor:
            z = in_groups(z, lambda flat: operator.apply(flat, kernel, bias, groups, stride))
            z = pointwise(own.of("up"), F.relu(z), operator.layout)
            return z * as_vector(own("scale"), z, operator.layout)

        return as_channels_first(delta, in_dtype_of(self.scale, x), self.layout).to(x.dtype)

    def as_kernel(self, host: nn.Module) -> dict[str, Tensor]:
        """Refuse: Δ is nonlinear.

        Raises:
            VisadaptError: always.
        """
        raise VisadaptError("it has a nonlinearity (ReLU)")

    def as_affine(self) -> tuple[Tensor, Tensor | None]:
        """Refuse, likewise.

        Raises:
            VisadaptError: always.
        """
        raise VisadaptError("it has a nonlinearity (ReLU)")


class ConvBeside(ConvBottleneck):
    """Δ(x) beside a convolution."""

    role: ClassVar[str] = "beside"

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)

    def rowwise(self, x: Tensor, own: Own) -> Tensor:
        """The same for a batch whose rows have tensors of their own."""
        return self.change_rowwise(x, own)


class ConvAfter(ConvBottleneck):
    """u + Δ(u)."""

    role: ClassVar[str] = "after"

    def forward(self, u: Tensor) -> Tensor:
        return u + self.change(u)

    def rowwise(self, u: Tensor, own: Own) -> Tensor:
        """The same for a batch whose rows have tensors of their own."""
        return u + self.change_rowwise(u, own)


class BranchAdapter(ConvBottleneck):
    """F(x) + Δ(x) at the end of a branch, with x as stored by the `Tap` of the block."""

    role: ClassVar[str] = "after"

    def __init__(
        self, method: ConvAdapter, inputs: int, outputs: int, operator: Operator, layout: str, slot: Slot
    ) -> None:
        super().__init__(method, inputs, outputs, operator, layout)
        self._slot = slot

    def forward(self, h: Tensor) -> Tensor:
        x = self._kept()
        return h + self.change(x, self._stride(x, h))

    def rowwise(self, h: Tensor, own: Own) -> Tensor:
        """The same for a batch whose rows have tensors of their own."""
        x = self._kept()
        return h + self.change_rowwise(x, own, self._stride(x, h))

    def _kept(self) -> Tensor:
        return self._slot.take("a residual-parallel adapter", "its block's forward")

    def _stride(self, x: Tensor, h: Tensor) -> tuple[int, ...]:
        """The stride of the whole branch, from the sizes of its input and output."""
        first = 2 if is_channels_first(self.layout) else 1
        return tuple(-(-x.shape[axis] // h.shape[axis]) for axis in range(first, first + rank_of(self.layout)))


class Tap(nn.Module):
    """Stores the input of its host for the end of the branch."""

    role: ClassVar[str] = "before"

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self._slot = slot

    def forward(self, x: Tensor, *rest: Any) -> tuple[Any, ...]:
        self._slot.put(x)
        return (x, *rest)

    def rowwise(self, args: tuple[Any, ...], own: Own) -> tuple[Any, ...]:
        """The same for a batch whose rows have tensors of their own."""
        return self(*args)  # type: ignore[no-any-return]
