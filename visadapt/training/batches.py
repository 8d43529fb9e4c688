"""Batches of inputs and labels, from any supported form of data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from visadapt.data.lazy_images import ImageFiles
from visadapt.data.samples import Samples
from visadapt.data.targets import held_out
from visadapt.errors import VisadaptError
from visadapt.training.engine import Engine
from visadapt.training.forms import described, is_dataset, loader_of, samples_of, split_at
from visadapt.training.losses import Objective


class Batches:
    """Data as batches, one pass per epoch.

    Args:
        data: one of
            `Samples`, or an `visadapt.data.ImageSplit`;
            `visadapt.data.ImageFiles`, in their order;
            a pair of inputs (a tensor or a mapping of tensors) and labels;
            a mapping of tensors, one of them called ``labels``;
            a data set of torch or of the ``datasets`` library, of such pairs or mappings of one sample each;
            a ``DataLoader``, or another iterable that has a length, can be iterated repeatedly and yields such a pair
            or mapping per batch. It does its own batching and shuffling.
        batch_size: samples per batch; ignored for data that is batched already.
        purpose: ``"training"``, for example; for error messages.
        labelled: whether labels are required.
        objective: the loss that takes the labels.

    Raises:
        VisadaptError: the data has none of these forms, is empty, or lacks labels.
    """

    def __init__(
        self, data: Any, batch_size: int, purpose: str, labelled: bool = True, objective: Objective | None = None
    ) -> None:
        self.purpose = purpose
        self.objective = objective or Objective()
        self.batch_size = batch_size
        self.labelled = labelled
        self.rank, self.processes, self.pinned = 0, 1, False
        if isinstance(data, ImageFiles):
            data = data.batches(batch_size)
        self.samples = samples_of(data, purpose)
        self.loader: Iterable[Any] | None = None
        if self.samples is None:
            if is_dataset(data):
                data = loader_of(data, batch_size, purpose)
            if not isinstance(data, Iterable) or not hasattr(data, "__len__") or isinstance(data, str):
                raise VisadaptError(
                    f"{purpose} data must be a pair of inputs and labels, an ImageSplit, a mapping with 'labels', a "
                    f"Dataset or a DataLoader, got {type(data).__name__}"
                )
            self.loader = data
            try:
                len(self)
            except TypeError as error:
                raise VisadaptError(
                    f"{purpose} data must have a known number of batches, got a {type(data).__name__} without one: "
                    "give its IterableDataset a __len__, the number of samples"
                ) from error
        elif labelled and self.samples.labels is None:
            raise VisadaptError(f"the {purpose} data has no labels")
        elif labelled and self.samples.labels is not None:
            self.objective.kind(self.samples.labels)
        if len(self) == 0:
            raise VisadaptError(f"the {purpose} data is empty")

    def __len__(self) -> int:
        """Number of batches per epoch."""
        if self.samples is None:
            return len(self.loader)  # type: ignore[arg-type]
        return -(-len(self.samples) // self.batch_size)

    @property
    def labels(self) -> Tensor | None:
        """All labels, if they are in memory."""
        return None if self.samples is None else self.samples.labels

    @property
    def generator(self) -> torch.Generator | None:
        """The generator that a loader shuffles with; None if it uses torch's global one."""
        owners = (self.loader, getattr(self.loader, "sampler", None))
        candidates = [getattr(o, name, None) for o in owners for name in ("synchronized_generator", "generator")]
        return next((generator for generator in candidates if isinstance(generator, torch.Generator)), None)

    def share(self, engine: Engine) -> None:
        """Read only this process's part of every batch; all parts have the same length.

        Raises:
            VisadaptError: the data is an iterable that cannot be shared.
        """
        self.rank, self.processes = engine.rank, engine.processes
        self.pinned = engine.device.type == "cuda"
        if self.samples is not None or self.processes == 1:
            return
        if not isinstance(self.loader, torch.utils.data.DataLoader):
            raise VisadaptError(
                f"{self.purpose} data for {self.processes} processes must be tensors or a DataLoader, "
                f"got {type(self.loader).__name__}"
            )
        try:
            self.loader = engine.accelerator.prepare_data_loader(self.loader)
        except ValueError as error:
            raise VisadaptError(f"{self.processes} processes cannot share the {self.purpose} data: {error}") from error

    def epoch(self, shuffle: torch.Generator | None = None) -> Iterator[Batch]:
        """Iterate over the data once, in a random order if a generator is given."""
        if self.samples is None:
            yield from self._loaded()
            return
        count = len(self.samples)
        order = torch.arange(count) if shuffle is None else torch.randperm(count, generator=shuffle)
        for rows in torch.split(order, self.batch_size):
            size = -(-len(rows) // self.processes)
            share = torch.arange(self.rank * size, (self.rank + 1) * size) % len(rows)
            inputs, labels = self.samples.take(rows[share])
            if self.pinned:
                # copies from pinned memory do not wait for the device; a DataLoader has an option for it
                inputs, labels = tree_map_only(Tensor, _pin, (inputs, labels))
            yield Batch(inputs, labels, len(rows))

    def _loaded(self) -> Iterator[Batch]:
        loader: Any = self.loader
        for batch in loader:
            if not self.labelled and isinstance(batch, (tuple, list)) and len(batch) == 1:
                (batch,) = batch  # a TensorDataset of inputs only
            part = samples_of(batch, self.purpose)
            if part is None or (self.labelled and part.labels is None):
                raise VisadaptError(
                    f"a batch of the {self.purpose} data must be a pair of inputs and labels, got {described(batch)}"
                )
            rows = len(part) * self.processes
            if self.processes > 1 and loader.end_of_dataloader and loader.remainder > 0:
                rows = loader.remainder
            yield Batch(part.inputs, part.labels, rows)


class Batch(NamedTuple):
    """One process's part of a batch.

    Attributes:
        inputs: the part's inputs.
        labels: the part's labels.
        rows: number of samples in the whole batch. The concatenated parts of all processes begin with these; the rest
            is padding that makes the parts equally long.
    """

    inputs: Any
    labels: Tensor | None
    rows: int


def held_back(data: Any, fraction: float, seed: int) -> tuple[Any, Any]:
    """Take a share of training samples for validation, of each class alike.

    Args:
        data: training data of any of the forms of `Batches`, but for a loader.
        fraction: share of the samples, in (0, 1); at least one sample.
        seed: the same seed chooses the same samples.

    Returns:
        The other samples, and those that were taken.

    Raises:
        VisadaptError: the data comes in batches, has no labels, or is a single sample.
    """
    whole = data if isinstance(data, ImageFiles) else samples_of(data, "training")
    if whole is None and is_dataset(data) and hasattr(data, "__len__"):
        count = len(data)
        if count > 1:
            # the labels are not known before all samples have been read
            left, chosen = held_out(torch.zeros(count), max(1, round(fraction * count)), seed)
            return split_at(data, left, chosen)
    if whole is None:
        raise VisadaptError(
            f"training data must be tensors or a data set for validation={fraction:g}, got a {type(data).__name__}: "
            "split its data set, such as with torch.utils.data.random_split"
        )
    if whole.labels is None:
        raise VisadaptError("the training data has no labels")
    if len(whole) < 2:
        raise VisadaptError(
            f"training data must have at least two samples for validation={fraction:g}, got {len(whole)}"
        )
    labels = whole.labels
    if labels.ndim != 1 or labels.dtype != torch.int64 or int(labels.min()) < 0:
        # not classes: chosen regardless of the labels
        labels = torch.zeros(len(whole))
    left, chosen = held_out(labels.cpu(), max(1, round(fraction * len(whole))), seed)
    if isinstance(whole, ImageFiles):
        return whole.subset(left), whole.subset(chosen)
    return Samples(*whole.take(left)), Samples(*whole.take(chosen))


def _pin(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor
