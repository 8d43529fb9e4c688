"""Baselines that put nothing at any site: a head alone, or a head and the norms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from visadapt.backbone.facts import Facts
from visadapt.backbone.site import Site
from visadapt.errors import VisadaptError
from visadapt.methods.method import Method
from visadapt.methods.policy import Policy


@dataclass(frozen=True)
class Linear(Method):
    """Feature-based transfer: a head on the frozen backbone (Houlsby et al. 2019, arXiv 1902.00751, §1).

    No parameters but the head's; the norms are frozen by default.

    Raises:
        VisadaptError: the task would have norms of its own, no head of its own, or sites.

    Examples:
        >>> model = visadapt.inject(backbone, visadapt.Linear(), task="flowers", num_classes=3)
        >>> len(visadapt.parameters(model, "flowers")), visadapt.summary(model)["flowers"].methods
        (2, 'Linear()')
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    norms: ClassVar[str] = "frozen"

    def parts(self, backbone: Facts, sites: Sequence[Site], task: Policy) -> Iterable[tuple[str, nn.Module]]:
        self.no_sites(sites)
        if task.norms != "frozen":
            raise VisadaptError(
                f"Linear() trains a head on frozen features, and norms={task.norms!r} would change these: pass "
                "norms='frozen', or Norms() to train the norms as well"
            )
        if task.head == "frozen" and backbone.head is None:
            raise VisadaptError(
                f"Linear() trains a head, and {backbone.name} has none: put a layer behind it, or name one with head="
            )
        if task.head == "frozen":
            raise VisadaptError("Linear() trains a head: give num_classes=, or head='copy' for the backbone's")
        return ()


@dataclass(frozen=True)
class Norms(Method):
    """The norms alone, and the head (Houlsby et al. 2019, arXiv 1902.00751, §3.4; BN adaptation on images).

    No parameters but those of the norm policy: with ``norms="affine"`` their weights and biases, with ``full`` their
    running statistics too.

    Raises:
        VisadaptError: ``norms="frozen"``; the backbone has no norms; ``inject`` was given ``where=``.

    Examples:
        >>> model = visadapt.inject(backbone, visadapt.Norms(), task="flowers", num_classes=3)
        >>> len(visadapt.parameters(model, "flowers")), visadapt.summary(model)["flowers"].methods
        (44, 'Norms()')
    """

    kinds: ClassVar[tuple[str, ...]] = ()

    def parts(self, backbone: Facts, sites: Sequence[Site], task: Policy) -> Iterable[tuple[str, nn.Module]]:
        self.no_sites(sites)
        if task.norms == "frozen":
            raise VisadaptError("Norms() trains the norms, and norms='frozen' forbids it: pass 'affine' or 'full'")
        if not backbone.norms:
            raise VisadaptError(f"Norms(): {backbone.name} has no norms")
        return ()
