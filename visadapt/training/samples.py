"""What is trained on: any of the forms that data comes in, as batches of inputs and labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visadapt.errors import VisadaptError


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs in memory and their labels.

    Args:
        inputs: a tensor ``(N, …)``, or a dict of such tensors by the model's argument names.
        labels: class indices, int64, ``(N,)``; None where there are none to compare with.
    """

    inputs: Tensor | dict[str, Tensor]
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        parts = self.inputs.values() if isinstance(self.inputs, dict) else [self.inputs]
        counts = {len(part) for part in parts}
        if len(counts) != 1:
            raise VisadaptError(f"inputs of different lengths: {', '.join(str(n) for n in sorted(counts))}")
        if self.labels is None:
            return
        if self.labels.ndim != 1 or self.labels.dtype != torch.int64:
            shape = tuple(self.labels.shape)
            raise VisadaptError(f"labels are class indices, int64 of shape (N,); got {self.labels.dtype} of {shape}")
        if len(self.labels) not in counts:
            raise VisadaptError(f"{len(self.labels)} labels for {counts.pop()} inputs")

    def __len__(self) -> int:
        first = next(iter(self.inputs.values())) if isinstance(self.inputs, dict) else self.inputs
        return len(first)

    def take(self, index: Tensor) -> tuple[Any, Tensor | None]:
        """The samples at these indices: inputs, labels."""
        if isinstance(self.inputs, dict):
            inputs: Any = {key: value[index] for key, value in self.inputs.items()}
        else:
            inputs = self.inputs[index]
        return inputs, None if self.labels is None else self.labels[index]


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

    def epoch(self, shuffle: torch.Generator | None = None) -> Iterator[tuple[Any, Tensor | None]]:
        """One pass: (inputs, labels) a batch, in a new order if there is a generator to shuffle with."""
        if self.samples is None:
            for batch in self.loader or ():
                part = _samples(batch, self.what)
                if part is None or (self.labelled and part.labels is None):
                    raise VisadaptError(f"a batch of the {self.what} data is no pair of inputs and labels")
                yield part.inputs, part.labels
            return
        count = len(self.samples)
        order = torch.arange(count) if shuffle is None else torch.randperm(count, generator=shuffle)
        for start in range(0, count, self.batch_size):
            yield self.samples.take(order[start : start + self.batch_size])


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


def ready(inputs: Any) -> Any:
    """What is done to a batch where the caller says nothing: bytes become normalised images, padding is cut away.

    Args:
        inputs: a batch. uint8 images ``(N, 3, H, W)`` are normalised as ImageNet's networks want them; token ids with
            an ``attention_mask`` are cut to the longest text in the batch; anything else stays as it is.
    """
    if isinstance(inputs, Tensor) and inputs.dtype == torch.uint8:
        from visadapt.data import normalize

        return normalize(inputs)
    if isinstance(inputs, Mapping) and isinstance(inputs.get("attention_mask"), Tensor):
        return trimmed(dict(inputs))
    return inputs


def trimmed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokenised texts without the columns in which every text has padding."""
    mask = inputs["attention_mask"]
    used = mask.bool().any(0).nonzero().flatten()
    if len(used) == 0:
        return inputs
    first, last = int(used[0]), int(used[-1]) + 1
    return {k: v[:, first:last] if v.shape[:2] == mask.shape else v for k, v in inputs.items()}


def tokenised(tokenizer: Any, split: Any, max_length: int = 128) -> Samples:
    """Texts as tensors.

    Args:
        tokenizer: one of transformers'.
        split: a :class:`~visadapt.data.TextSplit`, of texts or of pairs.
        max_length: tokens; longer texts are cut.

    Raises:
        VisadaptError: there is no text.
    """
    if not len(split):
        raise VisadaptError("there is no text to tokenise")
    first = split.texts[0]
    columns = [list(split.texts)] if isinstance(first, str) else [list(side) for side in zip(*split.texts, strict=True)]
    made = tokenizer(*columns, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return Samples(dict(made), split.labels)
