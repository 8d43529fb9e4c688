"""The forms that data may have: tensors in memory, data sets of samples, and loaders of batches."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from visadapt.arguments import reading
from visadapt.data.lazy_images import ImageFiles
from visadapt.data.samples import Samples
from visadapt.errors import VisadaptError, first_line


@reading("data")
def samples_of(data: Any, purpose: str) -> Samples | None:
    """Take data in memory as `Samples`; None if it has another form.

    Arrays of numpy become tensors, and so do labels that are a list of numbers; integers of any width become int64.

    Raises:
        VisadaptError: the data has such a form, but its parts are not tensors or differ in length.
    """
    if isinstance(data, Samples):
        return data
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(whole := _tensor(data), Tensor):
        return Samples(whole)
    if isinstance(data, Mapping):
        inputs = {str(key): _tensor(value) for key, value in data.items() if key != "labels"}
        if not inputs or not all(isinstance(value, Tensor) for value in inputs.values()):
            types = ", ".join(f"{key}: {type(value).__name__}" for key, value in inputs.items()) or "labels only"
            raise VisadaptError(f"{purpose} data must map argument names to tensors, got {types}")
        return Samples(inputs, _labels(data.get("labels"), purpose))
    if isinstance(data, (tuple, list)) and len(data) == 2:
        first = dict(data[0]) if isinstance(data[0], Mapping) else _tensor(data[0])
        if isinstance(first, (Tensor, dict)) and isinstance(labels := _labels(data[1], purpose), Tensor):
            return Samples(first, labels)
    if isinstance(getattr(data, "texts", None), list):
        raise VisadaptError(f"the {purpose} data is text: convert it with visadapt.training.tokenised")
    if isinstance(getattr(data, "images", None), Tensor) and isinstance(getattr(data, "labels", None), Tensor):
        return Samples(data.images, data.labels)
    return None


def is_dataset(data: Any) -> bool:
    """Whether data are samples that are read one by one: a data set of torch, or of the ``datasets`` library."""
    if isinstance(data, ImageFiles):
        return False
    library: Any = sys.modules.get("datasets")
    return isinstance(data, Dataset) or (library is not None and isinstance(data, library.Dataset))


def loader_of(data: Any, batch_size: int, purpose: str, *, shuffle: bool = False, seed: int = 0) -> DataLoader[Any]:
    """Return a loader of the samples of a data set, for which `is_dataset` holds.

    Args:
        data: the data set; a sample is a pair of an input and a label, or a mapping with ``labels``.
        batch_size: samples per batch.
        purpose: of the data, for messages.
        shuffle: whether the order is random, anew in each pass.
        seed: of the order.

    Raises:
        VisadaptError: the number of samples is not known, or, when they are read, samples do not make a batch.
    """
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise VisadaptError(
            f"{purpose} data must have a known number of samples, got {type(data).__name__}: give a data set with "
            "__len__ and __getitem__"
        )
    data = _as_tensors(data)

    def joined(samples: list[Any]) -> Any:
        try:
            return default_collate(samples)
        except (TypeError, RuntimeError) as error:
            raise VisadaptError(
                f"samples of the {purpose} data do not make a batch ({first_line(error):.200}): convert each to "
                "tensors of one shape, or pass a DataLoader with a collate_fn"
            ) from error

    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size, shuffle=shuffle and len(data) > 0, collate_fn=joined, generator=generator)


def split_at(data: Any, left: Tensor, chosen: Tensor) -> tuple[Any, Any]:
    """Return the samples of a data set at two lists of indices, unread."""
    data = _as_tensors(data)
    return Subset(data, left.tolist()), Subset(data, chosen.tolist())


def described(batch: Any) -> str:
    """Describe what stands where a batch should, for messages."""
    if isinstance(batch, Mapping):
        named = ", ".join(map(repr, batch))
        hint = " (the labels must be called 'labels')" if "labels" not in batch else ""
        return f"a {type(batch).__name__} of {named}{hint}"
    if isinstance(batch, (tuple, list)):
        kinds = ", ".join(type(part).__name__ for part in batch[:4]) + (", …" if len(batch) > 4 else "")
        hint = ": inputs must be tensors" if len(batch) == 2 and isinstance(batch[1], Tensor) else ""
        return f"a {type(batch).__name__} of {kinds}{hint}"
    return type(batch).__name__


def _as_tensors(data: Any) -> Any:
    """A data set of the ``datasets`` library that gives tensors, not lists; other ones as they are."""
    unformatted = isinstance(getattr(data, "format", None), Mapping) and data.format.get("type") is None
    return data.with_format("torch") if unformatted else data


def _tensor(value: Any) -> Any:
    """An array of numpy as a tensor; anything else as it is."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf":
        return torch.as_tensor(value)
    return value


def _labels(value: Any, purpose: str) -> Any:
    """Labels as a tensor, of integers int64; anything that is not a list of numbers as it is."""
    labels = _tensor(value)
    if isinstance(labels, (list, tuple)) and labels:
        if any(isinstance(label, str) for label in labels):
            name = next(label for label in labels if isinstance(label, str))
            raise VisadaptError(f"{purpose} labels must be numbers, got names such as {name!r:.80}: number the classes")
        if all(isinstance(label, (int, float)) for label in labels):
            labels = torch.tensor(labels)
    if isinstance(labels, Tensor) and labels.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        return labels.long()
    return labels
