"""A problem: a backbone to adapt and the data to adapt it to, by name, so that any process can build it."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visadapt.experiments.digest import digest
from visadapt.experiments.networks import network, short_name
from visadapt.training import Samples, ready


@dataclass(frozen=True)
class Splits:
    """A problem's data in memory.

    Attributes:
        classes: their names.
        train: to train on.
        validation: to choose learning rates by; no part of ``train``.
        test: for the final figures only.
    """

    classes: tuple[str, ...]
    train: Samples
    validation: Samples
    test: Samples


@dataclass(frozen=True)
class Problem(ABC):
    """What contenders are compared on. Subsets are drawn once and for all: the same sizes are the same samples.

    Args:
        network: name of the backbone, or path of a file; see :func:`visadapt.experiments.networks.network`.
        data: name or path of the data set.
        train: number of training samples; None for all.
        validation: number of validation samples; None for all that the set brings.
        test: number of test samples; None for all.
        root: the folder in which the data set is, for those that come in one.
        options: of the backbone's builder, as pairs.
    """

    network: str
    data: str
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    root: str | None = None
    options: tuple[tuple[str, Any], ...] = ()

    modality: ClassVar[str]

    @property
    def metric(self) -> str:
        """What is measured; see ``visadapt.training.METRICS``."""
        return "accuracy"

    @property
    def name(self) -> str:
        """The data's, as a task can be called."""
        path = Path(self.data)
        plain = path.stem if path.is_file() else path.name if path.is_dir() else self.data
        return re.sub(r"[^A-Za-z0-9_-]+", "-", plain).strip("-_")

    @property
    def backbone(self) -> str:
        """The backbone's short name."""
        return short_name(self.network)

    @property
    def splits(self) -> Splits:
        """The data, read once."""
        return _splits(self)

    @abstractmethod
    def load(self) -> Splits:
        """Reads the data."""

    def prepare(self, batch: Any) -> Any:
        """What the backbone takes of a batch of inputs, in training and evaluation."""
        return ready(batch)

    def fresh(self) -> nn.Module:
        """A backbone as pretrained; what it may draw at random is the same each time, and the caller's draws stay."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return network(self.network, **dict(self.options)).eval()

    def described(self) -> dict[str, Any]:
        """Everything that figures depend on, as JSON values: files by what is in them, not by where they are."""
        facts = dataclasses.asdict(self)
        del facts["root"]
        places = {"network": Path(self.network.removeprefix("hf/")), "data": Path(self.root or "", self.data)}
        for name, place in places.items():
            if place.exists():
                facts[name] = f"{place.name} {digest(place)}"
        return {**facts, "metric": self.metric}


@lru_cache(maxsize=8)
def _splits(problem: Problem) -> Splits:
    return problem.load()


def drawn(count: int, most: int | None) -> Tensor:
    """Indices of ``most`` of ``count`` samples (all of them, if None), in a random order that is always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most]
