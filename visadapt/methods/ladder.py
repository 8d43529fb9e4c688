"""Ladder side-tuning: a small network beside the frozen one, fed by its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visadapt.backbone.facts import Facts
from visadapt.backbone.operators import CONVS
from visadapt.backbone.site import Site, is_channels_first, is_sequence, rank_of
from visadapt.checks import check_flag, check_width
from visadapt.errors import VisadaptError
from visadapt.methods.layers import Pointwise, in_dtype_of
from visadapt.methods.method import Method, width
from visadapt.methods.policy import Policy
from visadapt.methods.slot import Slot
from visadapt.methods.stacking import Own, added_pointwise, as_vector, depthwise, pointwise

_TEMPERATURE = 0.1

_WHERE = (
    "the forward in which its blocks ran (gradient checkpointing has nothing to save beside a Ladder: switch it off)"
)

_POOLS: tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


@dataclass(frozen=True)
class Ladder(Method):
    """z_i = side_i(μ_i·D_i·h_i + (1 − μ_i)·z_(i−1)) (Sung et al. 2022, arXiv 2206.06522, §3.2).

    h_i is the output of a block of the backbone, D_i: d_i → m, μ_i = σ(α_i/0.1), and z_1 = side_1(D_1·h_1). The output
    of the last block becomes h + U·z with U: m → d. In the paper it is U·z alone; with the sum, and U = 0, the network
    starts as it was, bit for bit, and its head trains no worse than a linear probe. Nothing before the last block's
    output depends on what the task trains: no gradient flows through the backbone, and one pass of it serves every
    task: with a list of tasks in `visadapt.using` and a batch of one image, the backbone runs once. This needs frozen
    norms, the default here: ``norms=`` must be ``frozen``.

    The paper's side blocks are Transformer layers of width m. Here they are z + P·GELU(M∗LN(z)): on series, maps and
    volumes M is a depthwise convolution of size 3 along every axis, on tokens a matrix m×m, and P a matrix m×m. Where
    maps become smaller, z_(i−1) is pooled to the new size. (d_i + 1)·m parameters per D_i, (m + 1)·d of U, one per μ_i,
    and per block m² + 3m for norm and P, and 10m on maps, or m² + m on tokens, for M. It does not merge.

    Args:
        m: width of the side network, or a fraction of the last block's channels in (0, 1).
        every: whether every block feeds it. By default every block does where all are of one width (Transformers), and
            the last block of each stage where stages are of several widths (convolutional networks).

    Raises:
        VisadaptError: an option is out of range; the norms are not frozen; the blocks' outputs are maps in one place
            and tokens in another.

    Examples:
        >>> model = visadapt.inject(backbone, visadapt.Ladder(m=4), task="flowers", num_classes=3)
        >>> images = torch.randn(2, 3, 32, 32)
        >>> cached = visadapt.cache_prefix(model, "flowers", images)
        >>> torch.allclose(cached(cached.rows).resume(), model(images))  # a later epoch: the side network alone
        True
    """

    kinds: ClassVar[tuple[str, ...]] = ("block", "mlp")
    norms: ClassVar[str] = "frozen"

    m: int | float = 64
    every: bool = False

    def __post_init__(self) -> None:
        check_width(self.m)
        check_flag(self.every, "every")

    def build(self, site: Site, host: nn.Module) -> nn.Module:
        raise VisadaptError("the size of a Ladder is that of one network beside all sites: give m=, not budget=")

    def parts(self, backbone: Facts, sites: Sequence[Site], task: Policy) -> Iterable[tuple[str, nn.Module]]:
        if task.norms != "frozen":
            raise VisadaptError(
                f"Ladder lets no gradient into the backbone, and norms={task.norms!r} trains there: norms must be "
                "'frozen'"
            )
        taps = _taps(sites, self.every)
        m = width(self.m, taps[-1].channels)
        rungs = [Rung(m, site, Slot()) for site in taps]
        for site, rung in zip(taps[:-1], rungs[:-1], strict=True):
            yield site.block, rung
        yield taps[-1].block, SideNetwork(m, taps[-1], rungs[-1], [rung._slot for rung in rungs[:-1]])


def _taps(sites: Sequence[Site], every: bool) -> list[Site]:
    """The sites whose blocks feed the side network, one per block."""
    blocks = list({site.block: site for site in sites}.values())
    if not every and len({site.channels for site in blocks}) > 1:
        blocks = [a for a, b in pairwise(blocks) if (a.stage, a.channels) != (b.stage, b.channels)] + blocks[-1:]
    ranks = {_rank(site.layout) for site in blocks}
    if len(ranks) > 1:
        layouts = ", ".join(dict.fromkeys(site.layout for site in blocks))
        raise VisadaptError(f"Ladder needs outputs of one kind, and there are {layouts}: choose blocks with where=")
    for site in blocks:
        inner = [other.block for other in blocks if other.block.startswith(f"{site.block}.")]
        if inner:
            raise VisadaptError(f"Ladder cannot take both {site.block} and {inner[0]}, which is in it")
    return blocks


def _rank(layout: str) -> int:
    return 0 if is_sequence(layout) else rank_of(layout)


class Rung(nn.Module):
    """D_i: stores the projection of a block's output for the side network."""

    role: ClassVar[str] = "watch"

    def __init__(self, m: int, site: Site, slot: Slot) -> None:
        super().__init__()
        self.channels, self.layout, self.place = site.channels, site.layout, site.block
        self._slot = slot
        self.down = Pointwise(site.channels, m, site.layout, std=site.channels**-0.5)

    def forward(self, h: Tensor) -> None:
        self._slot.put(self.projected(h))

    def projected(self, h: Tensor) -> Tensor:
        """D·h, channels on axis 1 of maps and on the last of tokens."""
        return self._first(self.down(in_dtype_of(self.down.weight, self._checked(h))))

    def _checked(self, h: Tensor) -> Tensor:
        axis = 1 if is_channels_first(self.layout) else -1
        if h.shape[axis] != self.channels:
            raise VisadaptError(
                f"the output of {self.place} must have {self.channels} channels on axis {axis} for this Ladder, "
                f"got a tensor of shape {tuple(h.shape)}: choose other blocks with where="
            )
        return h.detach()

    def _first(self, y: Tensor) -> Tensor:
        return y if is_sequence(self.layout) or is_channels_first(self.layout) else y.movedim(-1, 1)

    def rowwise(self, h: Tensor, own: Own) -> None:
        """The same for a batch whose rows have tensors of their own; see `projected_rowwise`."""
        self._slot.put(self.projected_rowwise(h, own))

    def projected_rowwise(self, h: Tensor, own: Own) -> Tensor:
        """D·h with each row's D."""
        x = in_dtype_of(self.down.weight, self._checked(h))
        return self._first(pointwise(own.of("down"), x, self.layout))


class SideNetwork(nn.Module):
    """All side blocks, at the last block of the backbone that they read: h → h + U·z."""

    role: ClassVar[str] = "after"

    def __init__(self, m: int, site: Site, last: Rung, slots: list[Slot]) -> None:
        super().__init__()
        self._slots = slots
        self.layout = site.layout
        self.rank = _rank(site.layout)
        self.last = last
        self.alpha = nn.Parameter(torch.zeros(len(slots))) if slots else None
        self.blocks = nn.ModuleList(SideBlock(m, self.rank) for _ in range(len(slots) + 1))
        self.up = Pointwise(m, site.channels, site.layout, 0.0)

    def forward(self, h: Tensor) -> Tensor:
        gate = None if self.alpha is None else torch.sigmoid(self.alpha / _TEMPERATURE)[:, None]
        z = self._climb([*self._kept(), self.last.projected(h)], gate, lambda i, z: cast("Tensor", self.blocks[i](z)))
        delta: Tensor = self.up(self._back(z))
        return h + delta.to(h.dtype)

    def _kept(self) -> list[Tensor]:
        return [slot.take("a Ladder's side network", _WHERE) for slot in self._slots]

    def _climb(self, inputs: list[Tensor], gate: Tensor | None, block: Callable[[int, Tensor], Tensor]) -> Tensor:
        """z of the last rung; ``gate`` is μ as (K − 1, 1) or (K − 1, N)."""
        z = block(0, inputs[0])
        for i, y in enumerate(inputs[1:]):
            assert gate is not None
            mu = gate[i].view(-1, *(1,) * (y.ndim - 1))
            z = block(i + 1, mu * y + (1 - mu) * _resized(z, y, self.rank))
        return z

    def _back(self, z: Tensor) -> Tensor:
        return z if self.rank == 0 or is_channels_first(self.layout) else z.movedim(1, -1)

    def as_affine(self) -> tuple[Tensor, Tensor | None]:
        """Refuse: a network of its own has no place in a layer's weight.

        Raises:
            VisadaptError: always.
        """
        raise VisadaptError("it is a network of its own beside the backbone")

    def rowwise(self, h: Tensor, own: Own) -> Tensor:
        """The same for a batch whose rows have tensors of their own; the rungs have run before."""
        inputs = [*self._kept(), self.last.projected_rowwise(h, own.of("last"))]
        gate = None if self.alpha is None else torch.sigmoid(own("alpha") / _TEMPERATURE).t()

        def block(i: int, z: Tensor) -> Tensor:
            return cast("SideBlock", self.blocks[i]).rowwise(z, own.of(f"blocks.{i}"))

        return added_pointwise(own.of("up"), self._back(self._climb(inputs, gate, block)), h, self.layout)


class SideBlock(nn.Module):
    """z + P·GELU(M∗LN(z)) at width m.

    Args:
        m: width.
        rank: number of axes of positions, of maps with channels on axis 1; 0 for tokens, with channels last.
    """

    def __init__(self, m: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.norm = nn.LayerNorm(m)
        self.mix: nn.Module = Pointwise(m, m, "NLC", m**-0.5)
        if rank:
            self.mix = CONVS[rank - 1](m, m, 3, padding=1, groups=m)  # type: ignore[arg-type]
        self.out = Pointwise(m, m, ("NLC", "NCL", "NCHW", "NCDHW")[rank], m**-0.5)

    def forward(self, z: Tensor) -> Tensor:
        x = self.norm(z.movedim(1, -1)).movedim(-1, 1) if self.rank else self.norm(z)
        return z + cast("Tensor", self.out(F.gelu(self.mix(x))))

    def rowwise(self, z: Tensor, own: Own) -> Tensor:
        """The same for a batch whose rows have tensors of their own."""
        layout = self.out.layout
        weight, shift = as_vector(own("norm.weight"), z, layout), as_vector(own("norm.bias"), z, layout)
        x = torch.addcmul(shift, _standardised(z, self.norm.eps, 1 if self.rank else -1), weight)
        x = depthwise(own.of("mix"), x) if self.rank else pointwise(own.of("mix"), x, layout)
        return z + pointwise(own.of("out"), F.gelu(x), layout)


def _standardised(z: Tensor, eps: float, axis: int) -> Tensor:
    """LayerNorm without its weights, along an axis where it lies in memory; in fp32 or wider."""
    if axis == -1:
        return F.layer_norm(z, z.shape[-1:], eps=eps)
    wide = z if z.dtype == torch.float64 else z.float()
    # not by var_mean, which torch computes slowly along an axis that is not the last
    centred = wide - wide.mean(axis, keepdim=True)
    var = centred.square().mean(axis, keepdim=True)
    return (centred * torch.rsqrt(var + eps)).to(z.dtype)


def _resized(z: Tensor, like: Tensor, rank: int) -> Tensor:
    """z pooled to the positions of the next rung."""
    if len(z) != len(like):
        raise VisadaptError(
            f"a Ladder cannot join outputs whose first axes are {len(z)} and {len(like)} long, as those of an encoder "
            "and a decoder may be: choose blocks of one of them with where="
        )
    if rank:
        size = like.shape[2:]
        return z if z.shape[2:] == size else _POOLS[rank - 1](z, size)
    if z.shape[1:-1] == like.shape[1:-1]:
        return z
    axes = like.ndim - 2
    if axes < 2 or z.ndim != like.ndim:
        raise VisadaptError(
            f"a Ladder cannot pool tokens of shape {tuple(z.shape)} to {tuple(like.shape)}: their map is not known; "
            "choose blocks of one length with where="
        )
    return _POOLS[axes - 1](z.movedim(-1, 1), like.shape[1:-1]).movedim(1, -1)
