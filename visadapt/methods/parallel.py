"""Rebuffi's parallel residual adapter: a 1×1 convolution beside a convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from visadapt.backbone.facts import Facts
from visadapt.backbone.modules import CHILD
from visadapt.backbone.operators import Operator, centre_tap, operator_of, plain_operator
from visadapt.backbone.site import Site
from visadapt.checks import check_choice, check_probability, check_width
from visadapt.errors import VisadaptError, nearest
from visadapt.methods.layers import Pointwise, in_dtype_of
from visadapt.methods.method import Method, width
from visadapt.methods.stacking import Own, pointwise
from visadapt.printable import shown


@dataclass(frozen=True)
class Parallel(Method):
    """y = W∗x + A∗x, with A a 1×1 convolution of the same stride (Rebuffi et al. 2018, arXiv 1803.10082, §3.2).

    A has C_out·C_in parameters and no bias: a ninth of a 3×3 conv; it stands before the norm that follows. With
    ``rank`` it is A = β·γᵀ (§3.3), r·(C_in + C_out) parameters. Beside a linear A is a matrix. It merges into any host
    that is not grouped, at the centre tap of its kernel.

    By default the network starts as it was, bit for bit: A = 0, or γ = 0 with β drawn, and has a gradient at the
    first step. The authors' code draws A (``init="he"``), which changes a finished network until training repairs it.

    Args:
        rank: None for a full A; else r, or a fraction of the site's channels in (0, 1).
        factor_of: name of a task whose β at the same sites is shared: this task trains γ alone, r·C_in parameters.
            The task's file has its own copy of β and needs no other file.
        dropout: probability with which whole channels of the adapter's input are dropped while training (the
            authors: 0.5).
        init: ``zero``, or ``he`` for He-normal.

    Raises:
        VisadaptError: an option is out of range; a site is not a convolution or linear; the task named by ``factor_of``
            has no factor of that rank there.

    Examples:
        >>> images = torch.randn(2, 3, 32, 32)
        >>> model = visadapt.inject(backbone, visadapt.Parallel(rank=2), task="flowers", num_classes=3).eval()
        >>> plain = visadapt.merge(model, "flowers")
        >>> torch.allclose(plain(images), model(images), atol=1e-4)
        True
    """

    kinds: ClassVar[tuple[str, ...]] = ("conv3x3",)

    rank: int | float | None = None
    factor_of: str | None = None
    dropout: float = 0.0
    init: str = "zero"

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_width(self.rank, "rank")
        if self.factor_of is not None and not isinstance(self.factor_of, str):
            raise VisadaptError(f"factor_of must be the name of a task, got {shown(self.factor_of)}")
        if self.factor_of is not None and self.rank is None:
            raise VisadaptError("factor_of= shares a factor of a low-rank adapter: give rank= as well")
        check_probability(self.dropout)
        check_choice(self.init, ("zero", "he"), "init")

    def build(self, site: Site, host: nn.Module) -> nn.Module:
        return ParallelAdapter(self, operator_of(host, site.full_name), site, self._factor(host))

    def check(self, backbone: Facts, sites: Sequence[Site]) -> None:
        if self.factor_of is None:
            return
        for site in sites:
            host = backbone.modules[site.host]
            rank = width(cast("int | float", self.rank), site.channels)
            factor = self._factor(host)
            if factor is None:
                known = [name for name in host._modules.get(CHILD) or () if self._factor(host, name) is not None]  # type: ignore[union-attr, attr-defined]
                raise VisadaptError(
                    f"no task {self.factor_of!r} with a low-rank {type(self).__name__} at {site.full_name}"
                    + nearest(self.factor_of, known)
                )
            if factor.shape[1] != rank:
                raise VisadaptError(
                    f"the factor of task {self.factor_of!r} at {site.full_name} has rank {factor.shape[1]}, not {rank}"
                )

    def _factor(self, host: nn.Module, task: str | None = None) -> Tensor | None:
        parts = host._modules.get(CHILD)
        parts = None if parts is None else parts.__dict__["_modules"].get(task or self.factor_of or "")
        part = None if parts is None else parts._modules.get(self.part)
        return part.beta.weight if isinstance(part, ParallelAdapter) and part.beta is not None else None


_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
"""Of whole channels where there are any, by the number of axes of positions that a convolution slides along."""


class ParallelAdapter(nn.Module):
    """The module of `Parallel` at one site: ``weight`` is A, or ``beta`` and ``gamma`` its factors."""

    role: ClassVar[str] = "beside"

    def __init__(self, method: Parallel, operator: Operator, site: Site, factor: Tensor | None = None) -> None:
        super().__init__()
        self.operator = operator
        self.dropout = method.dropout
        inputs, outputs, layout = operator.inputs, operator.outputs, operator.layout
        stride = operator.stride or None
        he = (2 / outputs) ** 0.5
        self.full = self.gamma = self.beta = None
        if method.rank is None:
            self.full = Pointwise(inputs, outputs, layout, 0.0, bias=False, stride=stride)
            if method.init == "he":
                nn.init.normal_(self.full.weight, std=he)
            return
        r = width(method.rank, site.channels)
        self.gamma = Pointwise(inputs, r, layout, 0.0, bias=False, stride=stride)
        if method.init == "he":
            nn.init.normal_(self.gamma.weight, std=he)
        self.beta = Pointwise(r, outputs, layout, 0.0, bias=False)
        nn.init.normal_(self.beta.weight, std=r**-0.5)
        if method.factor_of is not None:
            shared = cast("Tensor", self.beta.weight).detach() if factor is None else factor.detach().clone()
            del self.beta.weight
            self.beta.register_buffer("weight", shared)

    def forward(self, x: Tensor) -> Tensor:
        return self._around(x, lambda z: self._project(z))

    def _around(self, x: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
        first = self.gamma if self.full is None else self.full
        assert first is not None
        z = self.operator.at_centre(in_dtype_of(first.weight, x))
        if self.dropout and self.training:
            z = _DROPOUTS[self.operator.rank](z, self.dropout)
        return project(z).to(x.dtype)

    def _project(self, z: Tensor) -> Tensor:
        if self.full is not None:
            return cast("Tensor", self.full(z))
        assert self.gamma is not None
        assert self.beta is not None
        return cast("Tensor", self.beta(self.gamma(z)))

    def matrix(self) -> Tensor:
        """A, outputs × inputs."""
        if self.full is not None:
            return self.full.weight
        assert self.gamma is not None
        assert self.beta is not None
        return self.beta.weight @ self.gamma.weight

    def as_kernel(self, host: nn.Module) -> dict[str, Tensor]:
        """The kernel that the adapter adds to its host's weight.

        Raises:
            VisadaptError: the host is grouped, or its forward does more than apply its weight.
        """
        operator = plain_operator(host, type(host).__name__)
        return {"weight": centre_tap(operator, self.matrix(), host)}

    def rowwise(self, x: Tensor, own: Own) -> Tensor:
        """The same for a batch whose rows have tensors of their own."""
        layout, stride = self.operator.layout, self.operator.stride
        steps = (slice(None), slice(None), *(slice(None, None, step) for step in stride))

        def project(z: Tensor) -> Tensor:
            z = z[steps] if stride else z
            if self.full is not None:
                return pointwise(own.of("full"), z, layout, bias=False)
            return pointwise(own.of("beta"), pointwise(own.of("gamma"), z, layout, bias=False), layout, bias=False)

        return self._around(x, project)
