"""TSA: parallel adapters drawn near zero, and an alignment of the features before the head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visadapt.backbone.facts import Facts
from visadapt.backbone.heads import Head
from visadapt.backbone.modules import inside
from visadapt.backbone.operators import is_operator, operator_of
from visadapt.backbone.site import Site
from visadapt.checks import check_flag, is_real
from visadapt.errors import VisadaptError
from visadapt.methods.layers import Pointwise, in_dtype_of
from visadapt.methods.method import Method
from visadapt.methods.parallel import Parallel, ParallelAdapter
from visadapt.methods.policy import Policy
from visadapt.methods.stacking import Own, pointwise
from visadapt.printable import shown


@dataclass(frozen=True)
class TSA(Method):
    """y = W∗x + A∗x with A = 10⁻⁴·I at the start (Li, Liu, Bilen 2022, arXiv 2107.00358, §3).

    C_out·C_in parameters per site, as `Parallel`; the network starts near itself. The paper leaves the norms
    frozen: ``inject(model, TSA(align=True), num_classes=10, norms="frozen")``. It merges as ``Parallel`` does; the
    alignment stands before the head and does not.

    Args:
        init: ε in A = ε·I.
        align: whether the features pass through f + D·f, with a C×C matrix D that is zero at the start, on their way
            into the head (the paper's pre-classifier alignment I + D; C² parameters).

    Raises:
        VisadaptError: an option is out of range; a site is not a convolution or linear; ``align`` finds no head.

    Examples:
        >>> images = torch.randn(2, 3, 32, 32)
        >>> model = visadapt.inject(backbone, visadapt.TSA(), task="flowers", num_classes=3, norms="frozen").eval()
        >>> plain = visadapt.merge(model, "flowers")
        >>> torch.allclose(plain(images), model(images), atol=1e-4)
        True
    """

    kinds: ClassVar[tuple[str, ...]] = ("conv3x3",)

    init: float = 1e-4
    align: bool = False

    def __post_init__(self) -> None:
        if not is_real(self.init) or not 0 <= self.init <= 1:
            raise VisadaptError(f"init, the ε in A = ε·I, must be in [0, 1], got {shown(self.init)}")
        check_flag(self.align, "align")

    def build(self, site: Site, host: nn.Module) -> nn.Module:
        adapter = ParallelAdapter(Parallel(), operator_of(host, site.full_name), site)
        assert adapter.full is not None
        with torch.no_grad():
            nn.init.eye_(adapter.full.weight).mul_(self.init)
        return adapter

    def parts(self, backbone: Facts, sites: Sequence[Site], task: Policy) -> Iterable[tuple[str, nn.Module]]:
        yield from super().parts(backbone, sites, task)
        if self.align:
            yield _before_head(backbone, task.head_at or backbone.head)


def _before_head(backbone: Facts, head: Head | None) -> tuple[str, nn.Module]:
    if head is None:
        raise VisadaptError(f"align=True needs a head, and none was found in {backbone.name}")
    # a task's own head replaces the whole module, so the alignment comes before it, not inside
    path = next((p for p in head.modules if inside(head.final, p)), head.final)
    first = next(m for m in backbone.modules[path].modules() if is_operator(m))
    operator = operator_of(first, path)
    return path, Alignment(operator.inputs, operator.layout)


class Alignment(nn.Module):
    """f → f + D·f, on the input of its host."""

    role: ClassVar[str] = "before"

    def __init__(self, channels: int, layout: str) -> None:
        super().__init__()
        self.align = Pointwise(channels, channels, layout, 0.0, bias=False)

    def forward(self, f: Tensor, *rest: Any) -> tuple[Any, ...]:
        delta: Tensor = self.align(in_dtype_of(self.align.weight, f))
        return (f + delta.to(f.dtype), *rest)

    def rowwise(self, args: tuple[Any, ...], own: Own) -> tuple[Any, ...]:
        """The same for a batch whose rows have tensors of their own."""
        f, *rest = args
        delta = pointwise(own.of("align"), in_dtype_of(self.align.weight, f), self.align.layout, bias=False)
        return (f + delta.to(f.dtype), *rest)
