"""A block that a family recognises, and how its sites are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from visadapt.backbone.modules import below, joined, parameter_count, parent
from visadapt.backbone.site import Site

Ends = TypeVar("Ends")


@dataclass(frozen=True)
class Block:
    """A block of a backbone.

    Args:
        path: its path in the model.
        depth: its number among the blocks of its family, from the input, from 0.
        modules: the modules inside it, by their path in the model.
        traced: whether it was found by a run.
    """

    path: str
    depth: int
    modules: Mapping[str, nn.Module]
    traced: bool = False

    def inner(self, name: str) -> str:
        """Return the path in the model of a module that has this path in the block."""
        return joined(self.path, name)

    def site(
        self,
        host: str,
        kind: str,
        channels: int,
        layout: str,
        adapts: nn.Module,
        linear: tuple[str, ...] = (),
        norm: str = "",
    ) -> Site:
        """Return a site of the block; the arguments are those of `Site`, with the module that is adapted."""
        size = parameter_count(adapts)
        return Site(
            host, kind, channels, layout, self.depth, parent(self.path), self.path, size, linear, norm, self.traced
        )


def blocks(
    modules: Mapping[str, nn.Module], recognise: Callable[[nn.Module], Ends | None]
) -> Iterator[tuple[Block, nn.Module, Ends]]:
    """Number the blocks that a family recognises.

    Args:
        modules: the backbone's modules by path.
        recognise: returns where a block's branches end, and something false for any other module.

    Yields:
        The block, its module, and what ``recognise`` returned for it.
    """
    depth = 0
    for path, module in modules.items():
        if ends := recognise(module):
            yield Block(path, depth, below(modules, path)), module, ends
            depth += 1
