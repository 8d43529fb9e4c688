"""The base class of methods: a frozen dataclass that defines what is put at a site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import nn

from visadapt.arguments import takes
from visadapt.backbone.facts import Facts
from visadapt.backbone.site import Site, Where
from visadapt.errors import VisadaptError, nearest, option
from visadapt.methods.policy import Policy
from visadapt.printable import shown


@dataclass(frozen=True)
class Method:
    """WHAT is put at a site. A subclass is one file: its fields are its options, ``build`` makes its adapter.

    Attributes:
        kinds: the default kinds of site; empty if it is put at no site.
        where: the default of ``inject``'s ``where``; None for all sites of these kinds.
        norms: the default norm policy.

    Examples:
        >>> method = visadapt.Parallel(rank=4)
        >>> method.kinds, method.norms
        (('conv3x3',), 'affine')
        >>> method == visadapt.Parallel(rank=4)
        True
    """

    kinds: ClassVar[tuple[str, ...]] = ("block", "attention", "mlp")
    where: ClassVar[Where | None] = None
    norms: ClassVar[str] = "affine"

    @classmethod
    @takes()
    def of(cls, options: Mapping[str, Any]) -> Method:
        """The method with these options, by name, as command lines and catalogues spell them.

        Raises:
            VisadaptError: it has no such option (the nearest is named), or does not take the value.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise VisadaptError(f"{cls.__name__} has no option {shown(name)}{nearest(name, known)}")
        return cls(**options)

    @property
    def part(self) -> str:
        """Its name in a task's tensors: ``layer1.0.bn3.<part>.down.weight``."""
        return type(self).__name__.lower()

    def build(self, site: Site, host: nn.Module) -> nn.Module:
        """The adapter for one site, initialised, in fp32 (fp64 beside an fp64 backbone).

        Args:
            site: where it is put.
            host: the module there, to read shapes and initial values from; not to be changed.

        Returns:
            A module whose class may name its ``role`` at the host (see `visadapt.runtime.roles.role`).

        Raises:
            VisadaptError: the method cannot be put at such a site.
        """
        raise VisadaptError(f"{type(self).__name__} puts nothing at {site.full_name}")

    def parts(self, backbone: Facts, sites: Sequence[Site], task: Policy) -> Iterable[tuple[str, nn.Module]]:
        """Everything that the method puts into the backbone: pairs of a host's path and a part.

        One adapter per site, unless a method uses other places or none.

        Args:
            backbone: facts about the backbone, which must not be changed.
            sites: the sites that ``where`` chose.
            task: the task that will own the parts; its policies for norms and head are decided.
        """
        for site in sites:
            yield site.host, self.build(site, backbone.modules[site.host])

    def check(self, backbone: Facts, sites: Sequence[Site]) -> None:
        """Check what ``inject`` needs from the model beyond the sites; ``load`` does not, as its file has all it needs.

        Raises:
            VisadaptError: the method cannot be put in.
        """

    def no_sites(self, sites: Sequence[Site]) -> None:
        """For methods without sites.

        Raises:
            VisadaptError: ``where`` named some.
        """
        if sites:
            raise VisadaptError(f"{type(self).__name__} adds nothing at sites: leave {option('where')} out")

    def count(self, site: Site, host: nn.Module) -> int:
        """Number of parameters of the adapter at ``site``, without allocating it."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.build(site, host).parameters())

    def __str__(self) -> str:
        """Its name and the options that are not the defaults."""
        told = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(told)})"

    def options(self) -> dict[str, Any]:
        """Its fields by name, as a task file stores them; those of `later` only with another value than the default.

        Earlier versions can read a file without them.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {f.name: own[f.name] for f in fields(self) if "later" not in f.metadata or own[f.name] != f.default}


def later(default: Any) -> Any:
    """A field that the first version of a method did not have, with the default that keeps its behaviour."""
    return field(default=default, metadata={"later": True})


def width(m: int | float, channels: int) -> int:
    """A bottleneck's width: ``m`` itself, or that fraction of the site's channels (at least 1)."""
    return m if isinstance(m, int) else max(1, round(m * channels))
