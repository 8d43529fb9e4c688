"""What is trained on: any of the forms that data comes in, as batches of inputs and labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visadapt.data.samples import Samples
from visadapt.errors import VisadaptError
from visadapt.training.engine import Engine


class Batches:
    """Data as batches, epoch by epoch.

    Args:
        data: one of
            :class:`Samples`, or an :class:`~visadapt.data.ImageSplit`;
            a pair of inputs (a tensor or a mapping of tensors) and labels;
            a mapping of tensors, one of them called ``labels``;
            a ``DataLoader``, or any other iterable with a length that can be run through many times and gives such
            pairs or mappings a batch. It shuffles and batches for itself.
        batch_size: of the batches that are made here.
        what: what the data is for, in error messages.
        labelled: whether labels must be there.

    Raises:
        VisadaptError: it is none of these, or empty, or has no labels.
    """

    def __init__(self, data: Any, batch_size: int, what: str, labelled: bool = True) -> None:
        self.what = what
        self.batch_size = batch_size
        self.labelled = labelled
        self.rank, self.processes = 0, 1
        self.samples = _samples(data, what)
        self.loader: Iterable[Any] | None = None
        if self.samples is None:
            if not isinstance(data, Iterable) or not hasattr(data, "__len__") or isinstance(data, str):
                raise VisadaptError(
                    f"{what} data is a pair of inputs and labels, an ImageSplit, a mapping with 'labels' or a "
                    f"DataLoader; got {type(data).__name__}"
                )
            self.loader = data
        elif labelled and self.samples.labels is None:
            raise VisadaptError(f"the {what} data has no labels")
        if len(self) == 0:
            raise VisadaptError(f"the {what} data is empty")

    def __len__(self) -> int:
        """Number of batches an epoch."""
        if self.samples is None:
            return len(self.loader)  # type: ignore[arg-type]
        return -(-len(self.samples) // self.batch_size)

    @property
    def labels(self) -> Tensor | None:
        """All labels, where they are in memory."""
        return None if self.samples is None else self.samples.labels

    @property
    def generator(self) -> torch.Generator | None:
        """What a loader shuffles with, if not with torch's own random numbers."""
        owners = (self.loader, getattr(self.loader, "sampler", None))
        found = [getattr(o, name, None) for o in owners for name in ("synchronized_generator", "generator")]
        return next((generator for generator in found if isinstance(generator, torch.Generator)), None)

    def share(self, engine: Engine) -> None:
        """Has each of several processes read a part of every batch, all equally long.

        Raises:
            VisadaptError: the data is an iterable that cannot be shared.
        """
        self.rank, self.processes = engine.rank, engine.processes
        if self.samples is not None or self.processes == 1:
            return
        if not isinstance(self.loader, torch.utils.data.DataLoader):
            raise VisadaptError(f"{self.processes} processes can share tensors or a DataLoader as {self.what} data")
        try:
            self.loader = engine.accelerator.prepare_data_loader(self.loader)
        except ValueError as error:
            raise VisadaptError(f"{self.processes} processes cannot share the {self.what} data: {error}") from error

    def epoch(self, shuffle: torch.Generator | None = None) -> Iterator[Batch]:
        """One pass, in a new order if there is a generator to shuffle with."""
        if self.samples is None:
            yield from self._loaded()
            return
        count = len(self.samples)
        order = torch.arange(count) if shuffle is None else torch.randperm(count, generator=shuffle)
        for whole in torch.split(order, self.batch_size):
            size = -(-len(whole) // self.processes)
            own = torch.arange(self.rank * size, (self.rank + 1) * size) % len(whole)
            yield Batch(*self.samples.take(whole[own]), len(whole))

    def _loaded(self) -> Iterator[Batch]:
        loader: Any = self.loader
        for batch in loader:
            part = _samples(batch, self.what)
            if part is None or (self.labelled and part.labels is None):
                raise VisadaptError(f"a batch of the {self.what} data is no pair of inputs and labels")
            rows = len(part) * self.processes
            if self.processes > 1 and loader.end_of_dataloader and loader.remainder > 0:
                rows = loader.remainder
            yield Batch(part.inputs, part.labels, rows)


class Batch(NamedTuple):
    """What a process computes of a batch.

    Attributes:
        inputs: its part of the batch.
        labels: theirs.
        rows: samples in the whole batch. Laid end to end, the parts of all processes begin with these; what follows is
            there to make them equally long.
    """

    inputs: Any
    labels: Tensor | None
    rows: int


def _samples(data: Any, what: str) -> Samples | None:
    if isinstance(data, Samples):
        return data
    if isinstance(data, Tensor):
        return Samples(data)
    if isinstance(data, Mapping):
        inputs = {str(key): value for key, value in data.items() if key != "labels"}
        if not inputs or not all(isinstance(value, Tensor) for value in inputs.values()):
            raise VisadaptError(f"the {what} data is a mapping, but not one of tensors")
        return Samples(inputs, data.get("labels"))
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor):
        inner = data[0]
        if isinstance(inner, Mapping):
            inner = dict(inner)
        if isinstance(inner, (Tensor, dict)):
            return Samples(inner, data[1])
    if isinstance(getattr(data, "texts", None), list):
        raise VisadaptError(f"the {what} data is text: make tensors of it with visadapt.training.tokenised")
    if isinstance(getattr(data, "images", None), Tensor) and isinstance(getattr(data, "labels", None), Tensor):
        return Samples(data.images, data.labels)
    return None
