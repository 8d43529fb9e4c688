"""Samples in memory, and preparing batches of them for a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visadapt.arguments import check_fields, reading, takes
from visadapt.checks import check_count
from visadapt.data.transforms import normalize
from visadapt.errors import VisadaptError, nearest


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs in memory, with their labels.

    Args:
        inputs: a tensor ``(N, …)``, or a dict of such tensors by the model's argument names.
        labels: one row per sample: class indices (int64) or real values ``(N,)``, or what else a loss takes, such as
            probabilities ``(N, C)`` or dense classes ``(N, H, W)``; None for unlabelled samples.

    Examples:
        >>> samples = visadapt.training.Samples(torch.randn(8, 3, 32, 32), torch.arange(8) % 3)
        >>> len(samples)
        8
    """

    inputs: Tensor | dict[str, Tensor]
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        parts = self.inputs.values() if isinstance(self.inputs, dict) else [self.inputs]
        if not all(part.ndim for part in parts):
            raise VisadaptError("inputs must have one entry per sample, got a single value")
        counts = {len(part) for part in parts}
        if len(counts) != 1:
            raise VisadaptError(f"inputs must have one length, got {', '.join(str(n) for n in sorted(counts))}")
        if self.labels is None:
            return
        if self.labels.ndim < 1 or len(self.labels) not in counts:
            got = len(self.labels) if self.labels.ndim else "a single value as"
            raise VisadaptError(f"{got} labels for {counts.pop()} inputs")

    def __len__(self) -> int:
        first = next(iter(self.inputs.values())) if isinstance(self.inputs, dict) else self.inputs
        return len(first)

    @takes()
    def take(self, index: Tensor | slice) -> tuple[Any, Tensor | None]:
        """Return the inputs and labels at these indices.

        Raises:
            VisadaptError: they are not indices of samples.
        """
        try:
            if isinstance(self.inputs, dict):
                inputs: Any = {key: value[index] for key, value in self.inputs.items()}
            else:
                inputs = self.inputs[index]
            return inputs, None if self.labels is None else self.labels[index]
        except (IndexError, TypeError) as error:
            raise VisadaptError(f"index must be indices of samples, from 0 to {len(self) - 1} ({error})") from error


def ready(inputs: Any) -> Any:
    """Prepare a batch by default: normalise uint8 images, cut off padding of texts.

    Args:
        inputs: a batch. uint8 images ``(N, 3, H, W)`` are normalised as ImageNet's networks want them; token ids with
            an ``attention_mask`` are cut to the longest text in the batch; anything else stays as it is.

    Returns:
        The batch as the model takes it: float32 ``(N, 3, H, W)`` for uint8 images.

    Examples:
        >>> images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        >>> visadapt.training.ready(images).dtype
        torch.float32
    """
    if isinstance(inputs, Tensor) and inputs.dtype == torch.uint8:
        return normalize(inputs)
    if isinstance(inputs, Mapping) and isinstance(inputs.get("attention_mask"), Tensor):
        return trimmed(dict(inputs))
    return inputs


@takes()
def trimmed(inputs: dict[str, Tensor], multiple: int = 1) -> dict[str, Tensor]:
    """Cut off columns of tokenised texts in which every text has padding.

    On an accelerator the texts stay as they are: to find out would wait for it. Cut them before they go there.

    Args:
        inputs: tensors ``(N, L)`` by name, with an ``attention_mask``; others stay as they are.
        multiple: number that the length is kept a multiple of, as far as there is padding.

    Returns:
        The same tensors, ``(N, L')`` with L' ≤ L.

    Raises:
        VisadaptError: ``inputs`` have no ``attention_mask``.

    Examples:
        >>> ids = torch.tensor([[5, 6, 0], [7, 0, 0]])
        >>> visadapt.training.trimmed({"input_ids": ids, "attention_mask": (ids > 0).long()})["input_ids"].shape
        torch.Size([2, 2])
    """
    check_count(multiple, "multiple")
    if "attention_mask" not in inputs:
        raise VisadaptError(f"inputs must have an attention_mask{nearest('attention_mask', inputs)}")
    mask = inputs["attention_mask"]
    used = mask.any(0).nonzero().flatten() if mask.device.type == "cpu" else mask.new_empty(0)
    if len(used) == 0:
        return inputs
    first, last = int(used[0]), int(used[-1]) + 1
    length = min(mask.shape[1], -(-(last - first) // multiple) * multiple)
    last = min(mask.shape[1], first + length)
    first = last - length
    return {k: v[:, first:last] if v.shape[:2] == mask.shape else v for k, v in inputs.items()}


@takes()
def tokenised(tokenizer: Any, split: Any, max_length: int = 128) -> Samples:
    """Tokenise texts.

    Args:
        tokenizer: a tokenizer of transformers.
        split: a `visadapt.data.TextSplit`, of texts or of pairs.
        max_length: maximum number of tokens; longer texts are truncated.

    Returns:
        Token ids and masks, int64 ``(N, L)`` each, with the split's labels.

    Raises:
        VisadaptError: the split is empty.

    Examples:
        >>> from visadapt.data import TextSplit, tokenizer_of
        >>> split = TextSplit(["a rose", "a white lily"], torch.tensor([0, 1]))
        >>> samples = visadapt.training.tokenised(tokenizer_of("bundled/minilm"), split)
        >>> samples.inputs["input_ids"].shape
        torch.Size([2, 5])
    """
    check_count(max_length, "max_length")
    if not isinstance(getattr(split, "texts", None), Sequence):
        raise VisadaptError(f"split must be a TextSplit, got a {type(split).__name__}")
    if not len(split):
        raise VisadaptError("texts to tokenise must not be empty")
    with reading("tokenizer"):
        known = hasattr(tokenizer, "pad_token")
    if not known:
        raise VisadaptError(f"tokenizer must be a tokenizer of transformers, got a {type(tokenizer).__name__}")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise VisadaptError(
                f"the tokenizer {type(tokenizer).__name__} must have a padding token or an end-of-text token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    first = split.texts[0]
    columns = [list(split.texts)] if isinstance(first, str) else [list(side) for side in zip(*split.texts, strict=True)]
    made = tokenizer(*columns, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return Samples(dict(made), split.labels)
