"""Facts about a head: its modules, the layers that give logits, and their width per class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from visadapt.backbone.modules import CHILD, joined, own_parameters
from visadapt.backbone.subclass import plain_class


@dataclass(frozen=True)
class Final:
    """One layer that gives logits.

    Attributes:
        path: of the linear or convolution.
        times: outputs per class: the anchors of a detector, 4 in a box regressor with a box per class.
        plus: outputs beside those: 1 for a "no object" that the number of classes does not count.
        std: standard deviation of a new layer's weights, where the library draws them from a normal; None for torch's
            own initial values.
        bias: initial value of a new layer's bias, with ``std``.
    """

    path: str
    times: int = 1
    plus: int = 0
    std: float | None = None
    bias: float = 0.0

    def width(self, classes: int) -> int:
        """Number of outputs for that many classes."""
        return self.times * classes + self.plus


@dataclass(frozen=True)
class Head:
    """Where a backbone's head is.

    Attributes:
        modules: paths of the modules that are the head, each replaced as a whole by a task's own; empty if the backbone
            is known to have none.
        finals: the layers that give logits, each inside one of ``modules`` or one of them. Several follow the number
            of classes together: a distilled model's two, one per stage, an auxiliary one. Empty if none depends on it.
        fresh: whether the library makes such a head for the problem at hand, so that a task trains it anyway.
        obstacle: why the head cannot follow a number of classes, for messages; empty if it can.
    """

    modules: tuple[str, ...]
    finals: tuple[Final, ...] = ()
    fresh: bool = False
    obstacle: str = ""

    @property
    def final(self) -> str:
        """Path of the first layer that gives logits, or of the last module where none is known."""
        return self.finals[0].path if self.finals else self.modules[-1]

    def width(self, modules: Mapping[str, nn.Module]) -> int | None:
        """Number of outputs of the first layer that gives logits; None if none is known."""
        final = modules.get(self.final)
        return width_of(final) if final is not None and is_final(final) else None

    def placed(self) -> Head:
        """Its place and widths, without what only matters before a task has a head of its own."""
        finals = tuple(Final(final.path, final.times, final.plus) for final in self.finals)
        return Head(self.modules, finals)

    def classes(self, modules: Mapping[str, nn.Module]) -> int | None:
        """Number of classes that the head of a backbone answers over; None if its finals do not say or disagree."""
        counts = set()
        for final in self.finals:
            count, rest = divmod(width_of(modules[final.path]) - final.plus, final.times)
            counts.add(None if rest else count)
        return counts.pop() if len(counts) == 1 else None


def is_final(module: nn.Module | None) -> bool:
    """Whether a module can be made anew with another number of outputs: a linear, or a convolution without groups."""
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1
    )


def width_of(final: nn.Module) -> int:
    """Number of outputs of a linear or convolution."""
    return int(final.out_features if isinstance(final, nn.Linear) else final.out_channels)  # type: ignore[arg-type]


def last_layer(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The layer that gives a module's output: the module itself, or the last with parameters of a chain.

    Returns:
        Its path; None if the module is neither, or something with parameters that is not a layer comes last.
    """
    module = modules.get(path)
    if module is None or is_final(module):
        return None if module is None else path
    if plain_class(module).forward is nn.Sequential.forward:
        for name, child in reversed(module._modules.items()):
            if child is not None and name != CHILD and own_parameters(child):
                return last_layer(joined(path, name), modules)
    return None
