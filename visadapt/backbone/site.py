"""Sites: the places in a backbone where a tensor of known width flows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from visadapt.table import Table

LAYOUTS = ("NCL", "NCHW", "NCDHW", "NLC", "NHWC", "NDHWC")
"""Where the channels are: on axis 1 of a series, map or volume, or on the last axis. ``NLC`` stands for any number of
position axes, including none: ``(N, C)``."""


WEIGHT = "weight"
"""The kind of a site whose host is not called: other code computes with its weight, which alone can be adapted."""


def is_channels_first(layout: str) -> bool:
    """Whether a layout has the channels on axis 1."""
    return layout.startswith("NC")


def rank_of(layout: str) -> int:
    """Number of position axes: 1 for a series, 2 for a map, 3 for a volume."""
    return len(layout) - 2


def is_sequence(layout: str) -> bool:
    """Whether positions have no known neighbours: tokens, or a vector."""
    return layout == "NLC"


def layout_named(axis: int | None, ndim: int) -> str | None:
    """The layout of tensors of ``ndim`` axes with their channels at ``axis``; None if that layout has no name."""
    if axis is None or ndim < 2:
        return None
    if axis == ndim - 1:
        return {4: "NHWC", 5: "NDHWC"}.get(ndim, "NLC")
    return {3: "NCL", 4: "NCHW", 5: "NCDHW"}.get(ndim) if axis == 1 else None


@dataclass(frozen=True)
class Site:
    """One place in a backbone.

    Attributes:
        host: path of the module whose output (or input, or weight) is adapted.
        kind: ``block`` (end of a residual branch, before the add), ``conv3x3``, ``attention``, ``mlp``, …,
            ``weight`` (of a module that is never called, since other code computes with its weight) or ``module`` for a
            place that only a glob of the user's names.
        channels: width of the host's output.
        layout: of the host's output: one of ``LAYOUTS``.
        depth: number of the block it belongs to, counted from the input, from 0.
        stage: the group of blocks it belongs to, such as ``layer3``.
        block: path of the block it belongs to.
        adapts: number of parameters of the module that it adapts, to compare an adapter with.
        linear: paths of the conv or linear, and of the norm behind it if there is one, whose composition is the host's
            output in eval mode: what a linear adapter after the host merges into. Empty if there are none.
        norm: path of the norm that alone takes the host's output; a constant after the host merges into it.
        traced: whether it took a run on fake tensors to find it. A task file keeps such sites, so that loading does not
            trace.

    Examples:
        >>> site = visadapt.sites(backbone)[0]
        >>> site.host, site.kind, site.channels, site.layout
        ('layer1.0.conv1', 'conv3x3', 8, 'NCHW')
    """

    host: str
    kind: str
    channels: int
    layout: str
    depth: int
    stage: str = ""
    block: str = ""
    adapts: int = 0
    linear: tuple[str, ...] = ()
    norm: str = ""
    traced: bool = False

    @property
    def full_name(self) -> str:
        """``kind:host``, unique in a model."""
        return f"{self.kind}:{self.host}"


Where: TypeAlias = "str | range | slice | int | Callable[[Site], bool] | Iterable[Any]"
"""How sites are chosen; see `select`."""


@dataclass(frozen=True)
class LeftOut:
    """A place that would be a site if the channel axis there were known.

    Attributes:
        kind: the kind of site.
        reason: why it is not one, with the path of the module.
    """

    kind: str
    reason: str


class Sites(tuple[Site, ...]):
    """The sites of a model, in the order of their depth; prints as a table.

    Attributes:
        left_out: what is missing among them, and why. A method that stands at these kinds of site by default refuses
            the model; ``where=`` chooses others.

    Examples:
        >>> sites = visadapt.sites(backbone, "conv3x3")
        >>> len(sites), sites[0].kind
        (16, 'conv3x3')
    """

    left_out: tuple[LeftOut, ...] = ()

    def kinds(self) -> list[str]:
        """The kinds there are, in order of appearance."""
        return list(dict.fromkeys(site.kind for site in self))

    def table(self) -> Table:
        """One row per site."""
        return Table(
            ("depth", "stage", "kind", "host", "channels", "layout", "adapts"),
            [(s.depth, s.stage, s.kind, s.host, s.channels, s.layout, f"{s.adapts:,}") for s in self],
        )

    def __str__(self) -> str:
        return "\n".join([str(self.table()), *(f"left out: {each.reason}" for each in self.left_out)])

    def __rich__(self) -> Any:
        return self.table().__rich__()
