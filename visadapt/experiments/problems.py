"""A problem: the names of a backbone and of the data to adapt it to, from which any process can build both."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visadapt.arguments import check_fields
from visadapt.checks import check_choice, check_count
from visadapt.data.inputs import Splits
from visadapt.data.targets import Targets
from visadapt.errors import VisadaptError
from visadapt.experiments.digest import digest
from visadapt.experiments.networks import network, short_name
from visadapt.training import ready
from visadapt.training.augmenting import Augment
from visadapt.training.metrics import METRIC_OF, METRICS, check_metric


@dataclass(frozen=True)
class Problem(ABC):
    """A backbone and a data set, which contenders are compared on.

    Subsets are random but fixed: the same sizes give the same samples, and a smaller subset is part of a larger one.

    Args:
        network: name of the backbone, or path of a file; see `visadapt.experiments.networks.network`.
        data: name or path of the data set.
        train: number of training samples; None for all.
        validation: number of validation samples; None for all of the set's own.
        test: number of test samples; None for all.
        root: folder that contains the data set, if ``data`` is relative to one.
        options: options of the backbone's builder, as pairs.
        table: options of a table's columns and labels, as pairs: those of `visadapt.data.load_images` and
            `visadapt.data.load_text`.
        scored_by: metric that chooses and is reported, of which a larger value is better; None for the usual one of
            such labels.

    Raises:
        VisadaptError: a number of samples is not positive, or the metric does not exist or is a loss.

    Examples:
        >>> from visadapt.experiments import ImageProblem, Problem, problem
        >>> issubclass(ImageProblem, Problem), problem("timm/resnet18", "digits").name
        (True, 'digits')
    """

    network: str
    data: str
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    root: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    table: tuple[tuple[str, Any], ...] = ()
    scored_by: str | None = None

    modality: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int):
                check_count(value, field.name)
        if self.scored_by is not None:
            check_choice(self.scored_by, [name for name in METRICS if name != "loss"], "metric")

    @property
    def metric(self) -> str:
        """Name of the metric; see ``visadapt.training.METRICS``."""
        return self.scored_by or self.usual_metric

    @property
    def usual_metric(self) -> str:
        """Name of the metric unless one is given.

        For several labels per sample, average precision: F1 counts positive logits, and of rare labels the regularised
        head that every contender starts from has none, so that all would be compared at 0.
        """
        if self.targets.separator is not None:
            return "mean_ap"
        return METRIC_OF[self.targets.problem_type]

    @property
    def targets(self) -> Targets:
        """What the labels are."""
        given = dict(self.table)
        return Targets(bool(given.get("regression")), given.get("multi_label"))

    @property
    def name(self) -> str:
        """Name of the data set as a valid task name."""
        path = Path(self.data)
        name = path.stem if os.path.isfile(path) else path.name if os.path.isdir(path) else self.data
        return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")

    @property
    def backbone(self) -> str:
        """Short name of the backbone."""
        return short_name(self.network)

    @property
    @abstractmethod
    def uses_root(self) -> bool:
        """Whether the data is looked for in ``root``, if that is given."""

    @property
    def splits(self) -> Splits:
        """The data as `visadapt.training.Samples`, loaded once per process.

        Raises:
            VisadaptError: the metric does not fit the labels, or all training samples have the same one.
        """
        return _splits(self)

    @abstractmethod
    def load(self) -> Splits:
        """Load the data; see `splits`."""

    def prepare(self, batch: Any) -> Any:
        """Convert a batch of inputs to the backbone's input, in training and evaluation."""
        return ready(batch)

    def augmentation(self) -> Augment | None:
        """Return how batches of training inputs are changed at random; None for not at all."""
        return None

    def fresh(self) -> nn.Module:
        """Build the pretrained backbone, in eval mode.

        Weights that are not pretrained have a fixed seed; the global random state is left unchanged.
        """
        return copy.deepcopy(_backbone(self.network, self.options))

    def described(self) -> dict[str, Any]:
        """Return everything that results depend on, as JSON values; files are identified by content, not by path."""
        facts = dataclasses.asdict(self)
        del facts["root"], facts["scored_by"]
        if not self.table:
            # results from before there were such options keep their keys
            del facts["table"]
        paths = {"network": Path(self.network.removeprefix("hf/")), "data": Path(self.root or "", self.data)}
        for name, path in paths.items():
            if os.path.exists(path):
                facts[name] = f"{path.name} {digest(path)}"
        return {**facts, "metric": self.metric}


# as many as an experiment has, since a process that computes their runs in parallel with others takes all in turn
@lru_cache(maxsize=32)
def _splits(problem: Problem) -> Splits:
    data = problem.load()
    labels = data.train.labels
    check_metric(problem.metric, labels, max(1, len(data.classes)))
    if labels.ndim == 1 and len(labels.unique()) < 2:
        only = f"{data.classes[int(labels[0])]!r}" if data.classes else f"{float(labels[0]):g}"
        raise VisadaptError(f"{problem.data} must have at least two different labels to train on, got only {only}")
    return data


@lru_cache(maxsize=2)
def _backbone(name: str, options: tuple[tuple[str, Any], ...]) -> nn.Module:
    """Build a backbone once per process: reading its weights takes longer than to copy it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return network(name, **dict(options)).eval()


def subset_indices(count: int, limit: int | None) -> Tensor:
    """Return the indices of ``limit`` of ``count`` samples (None for all), in a random order with a fixed seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]
