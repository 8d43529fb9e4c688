"""AdaptFormer: a bottleneck beside the MLP of a Transformer layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from visadapt.backbone.facts import Facts
from visadapt.backbone.modules import stacked_matrices
from visadapt.backbone.operators import is_linear, operator_of
from visadapt.backbone.site import Site
from visadapt.backbone.subclass import plain_class
from visadapt.checks import check_positive, check_probability, check_width
from visadapt.errors import VisadaptError
from visadapt.methods.layers import Pointwise, in_dtype_of
from visadapt.methods.method import Method, width
from visadapt.methods.policy import Policy
from visadapt.methods.stacking import Own, pointwise

_MLPS = ("mlp", "ffn", "feed_forward", "feedforward", "ff")


@dataclass(frozen=True)
class AdaptFormer(Method):
    """MLP(x) + s·W_up·ReLU(W_down·x), x the MLP's input (Chen et al. 2022, arXiv 2205.13535, §3.2).

    2dm + d + m parameters per layer of d channels. W_up and its bias are zero and W_down is drawn: the network starts
    as it was, bit for bit. The branch is nonlinear and does not merge.

    Args:
        m: width of the bottleneck, or a fraction of each site's channels in (0, 1).
        scale: s.
        dropout: probability with which elements of ReLU(·) are dropped while training.

    Raises:
        VisadaptError: an option is out of range; no MLP is found at a site.

    Examples:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2)
        >>> model = visadapt.inject(vit, visadapt.AdaptFormer(m=4), task="flowers", num_classes=3)
        >>> visadapt.summary(model)["flowers"].sites
        2
    """

    kinds: ClassVar[tuple[str, ...]] = ("mlp",)

    m: int | float = 64
    scale: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_width(self.m)
        check_positive(self.scale, "scale")
        check_probability(self.dropout)

    def build(self, site: Site, host: nn.Module) -> nn.Module:
        return ParallelBottleneck(self, site, _inputs(host, site.channels))

    def parts(self, backbone: Facts, sites: Sequence[Site], task: Policy) -> Iterable[tuple[str, nn.Module]]:
        for site in sites:
            path, before = _beside(backbone, site)
            # what is summed has the width of the sum
            yield path, BeforeSum(self, site, site.channels) if before else self.build(site, backbone.modules[path])


def _beside(backbone: Facts, site: Site) -> tuple[str, bool]:
    """The module whose input is the MLP's, and whether that input is only its second argument, to be summed."""
    host = backbone.modules[site.host]
    if _is_mlp(host):
        return site.host, False
    block = backbone.modules[site.block]
    at = f"{site.block}." if site.block else ""
    output = block._modules.get("output")
    # BERT and similar: one module computes LayerNorm(dropout(dense(h)) + x), called with h and x
    if output is not None and site.host.startswith(f"{at}output.") and "intermediate" in block._modules:
        if _takes_two(output):
            return f"{at}output", True
    else:
        for name in _MLPS:
            inner = block._modules.get(name)
            # ALBERT's ffn is only the first of two linears
            if inner is not None and _is_mlp(inner):
                return f"{at}{name}", False
    raise VisadaptError(
        f"no MLP found at {site.full_name} (looked for {', '.join(_MLPS)} in {site.block or backbone.name}): "
        "name it with where=; where no module is the MLP alone, Bottleneck can stand behind it"
    )


def _is_mlp(module: nn.Module) -> bool:
    # experts may be stacks of matrices instead of linears
    return sum(is_linear(m) + stacked_matrices(m) for m in module.modules()) >= 2


def _inputs(mlp: nn.Module, outputs: int) -> int:
    """Width of an MLP's input, which is not that of its output where it widens the next stage, as in MViT."""
    linears = [operator_of(m, "an MLP") for m in mlp.modules() if is_linear(m)]
    for first, last in ((0, -1), (-1, 0)):
        if linears and linears[last].outputs == outputs:
            return linears[first].inputs
    # the last linear is beside the chain, such as a gate of experts
    return outputs


def _takes_two(module: nn.Module) -> bool:
    """Whether a module is called with two tensors; I-BERT passes the scales of its integers between them."""
    return len(inspect.signature(plain_class(module).forward).parameters) == 3


class ParallelBottleneck(nn.Module):
    """s·W_up·ReLU(W_down·x), added to the output of the MLP."""

    role: ClassVar[str] = "beside"

    def __init__(self, method: AdaptFormer, site: Site, inputs: int) -> None:
        super().__init__()
        m = width(method.m, site.channels)
        self.scale = method.scale
        self.dropout = method.dropout
        self.down = Pointwise(inputs, m, site.layout, std=inputs**-0.5)
        self.up = Pointwise(m, site.channels, site.layout, std=0.0)

    def forward(self, x: Tensor) -> Any:
        return self.change(x, self.down, self.up)

    def change(self, x: Tensor, down: Callable[[Tensor], Tensor], up: Callable[[Tensor], Tensor]) -> Tensor:
        """The output of the branch, with these projections, for the MLP's input."""
        z = F.dropout(F.relu(down(in_dtype_of(self.down.weight, x))), self.dropout, self.training)
        return (self.scale * up(z)).to(x.dtype)

    def rowwise(self, x: Any, own: Own) -> Any:
        """The same for a batch whose rows have tensors of their own."""
        layout = self.down.layout
        return self.change(
            x, lambda z: pointwise(own.of("down"), z, layout), lambda z: pointwise(own.of("up"), z, layout)
        )

    def as_kernel(self, host: nn.Module) -> dict[str, Tensor]:
        """Refuse: the branch is nonlinear.

        Raises:
            VisadaptError: always.
        """
        raise VisadaptError("it has a nonlinearity (ReLU)")


class BeforeSum(ParallelBottleneck):
    """The same for an MLP whose last module takes the MLP's input as second argument and adds it."""

    role: ClassVar[str] = "before"

    def forward(self, h: Tensor, x: Tensor, *rest: Any) -> Any:  # type: ignore[override]
        return (h, x + super().forward(x), *rest)

    def rowwise(self, args: tuple[Any, ...], own: Own) -> tuple[Any, ...]:
        """The same for a batch whose rows have tensors of their own."""
        h, x, *rest = args
        return (h, x + super().rowwise(x, own), *rest)
