"""Inputs: how images and texts are prepared for a backbone, in a form that task files record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visadapt.backbone.trace import guess_input
from visadapt.data import load_images, load_squares, load_text, normalize, read_images, renumbered, tokenizer_of
from visadapt.data.file_requests import check_tokenizer, tokenizer
from visadapt.data.samples import Samples, tokenised, trimmed
from visadapt.data.text import TextSplit
from visadapt.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from visadapt.errors import VisadaptError
from visadapt.typed import fits, from_json

LARGEST, LONGEST = 8192, 131072
"""Upper bounds of the image side in pixels and of a text in tokens, so that no file can exhaust the memory."""


@dataclass(frozen=True)
class ImageInputs:
    """Images for a vision backbone; calling it with a uint8 batch returns the normalised batch that the backbone takes.

    Args:
        size: side of the square images in pixels.
        mean: mean per channel, in units of 1.
        std: standard deviation per channel, in units of 1.
    """

    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        _check_whole(self.size, LARGEST, "size", "pixels")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not fits(values, tuple[float, ...]) or len(values) != 3 or not all(map(math.isfinite, values)):
                raise VisadaptError(f"{name} must be three finite numbers, got {values!r}")
        if min(self.std) <= 0:
            raise VisadaptError(f"std must be three positive numbers, got {self.std!r}")

    def __call__(self, images: Tensor) -> Tensor:
        return normalize(images, self.size, mean=self.mean, std=self.std)

    @property
    def form(self) -> tuple[str, Any]:
        """What inputs must have in common to be collated: ``("images", size)``."""
        return "images", self.size

    def collate(self, batches: Sequence[Tensor]) -> Tensor:
        """Join batches that were prepared one by one, ``(N, 3, size, size)``."""
        return torch.cat(list(batches))

    def read(self, files: Iterable[Any]) -> Tensor:
        """Read image files, or images of Pillow, as uint8, ``(N, 3, size, size)``."""
        return read_images(files, self.size)

    def load(self, name: str, *, labels: Sequence[str] | None = None, seed: int = 0, **options: Any) -> Splits:
        """Load a data set; 10 % of its training images become the validation split.

        Args:
            name: as :func:`visadapt.data.load_images` takes it.
            labels: class names in the task's order; None for those of the data.
            seed: seed of the validation split.
            **options: passed to :func:`visadapt.data.load_images`.

        Raises:
            VisadaptError: an option applies to texts only.
        """
        if columns := sorted(options.keys() & {"text", "label", "header"}):
            raise VisadaptError(f"{name}: {' and '.join(columns)} apply to texts only, and these are images")
        # images of a folder are resized as `read` does; small images of a named data set stay small
        load = load_images if Path(name).is_dir() else load_squares
        found = load(name, size=self.size, classes=labels, **options)
        found = found if labels is None else renumbered(found, labels)
        train, validation = found.holdout(max(1, len(found.train) // 10), seed)
        return Splits(found.classes, train, validation, found.test, self)


@dataclass(frozen=True)
class TextInputs:
    """Texts for a language backbone; calling it with a batch of tokens cuts off columns that are all padding.

    Args:
        tokenizer: ``"bundled/minilm"`` or ``"hf/<name or folder>"``, as the backbone is named.
        length: maximum number of tokens; longer texts are truncated.
        pairs: whether a sample is a pair of texts.
        loader: loads the tokenizer by its name; not part of the description.
    """

    tokenizer: str
    length: int = 128
    pairs: bool = False
    loader: Callable[[str], Any] = field(default=tokenizer_of, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_whole(self.length, LONGEST, "length", "tokens")

    def __call__(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        return trimmed(tokens)

    @property
    def form(self) -> tuple[str, Any]:
        """What inputs must have in common to be collated: ``("texts", tokenizer)``."""
        return "texts", self.tokenizer

    def collate(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Join batches that were prepared one by one, ``(N, L)`` each, padded to the longest text."""
        tokenizer = self._tokenizer
        fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        longest = max(batch["input_ids"].shape[1] for batch in batches)

        def padded(name: str, values: Tensor) -> Tensor:
            missing = longest - values.shape[1]
            sides = (missing, 0) if tokenizer.padding_side == "left" else (0, missing)
            return F.pad(values, sides, value=fill.get(name, 0))

        return {name: torch.cat([padded(name, batch[name]) for batch in batches]) for name in batches[0]}

    def read(self, lines: Iterable[Any]) -> dict[str, Tensor]:
        """Tokenise texts, ``(N, L)`` each; a pair of texts is a tuple, or a line with a tab between the two.

        Raises:
            VisadaptError: a line is not a pair, and the task takes pairs.
        """
        texts: list[Any] = list(lines)
        if self.pairs:
            texts = [line if isinstance(line, tuple) else tuple(line.split("\t", 1)) for line in texts]
            single = next((pair[0] for pair in texts if len(pair) == 1), None)
            if single is not None:
                raise VisadaptError(f"a line must be a pair of texts separated by a tab, got {single[:60]!r}")
        made = self._tokens(TextSplit(texts, torch.zeros(len(texts), dtype=torch.int64))).inputs
        assert isinstance(made, dict)
        return made

    def load(self, name: str, *, labels: Sequence[str] | None = None, seed: int = 0, **options: Any) -> Splits:
        """Load a data set.

        Args:
            name: as :func:`visadapt.data.load_text` takes it.
            labels: class names in the task's order; None for those of the data.
            seed: seed of splits that the data set does not define.
            **options: passed to :func:`visadapt.data.load_text`.
        """
        found = load_text(name, seed=seed, classes=labels, **options)
        found = found if labels is None else renumbered(found, labels)
        splits = (found.train, found.validation, found.test)
        train, validation, test = (self._tokens(split) if len(split) else None for split in splits)
        inputs = dataclasses.replace(self, pairs=not isinstance(found.test.texts[0], str))
        return Splits(found.classes, train, validation, test, inputs)

    def _tokens(self, split: TextSplit) -> Samples:
        return tokenised(self._tokenizer, split, self.length)

    @cached_property
    def _tokenizer(self) -> Any:
        return self.loader(self.tokenizer)


def _check_whole(value: Any, most: int, what: str, unit: str) -> None:
    if not fits(value, int) or not 1 <= value <= most:
        raise VisadaptError(f"{what} must be an integer from 1 to {most} ({unit}), got {value!r}")


Inputs = ImageInputs | TextInputs

_KINDS: dict[str, type[ImageInputs] | type[TextInputs]] = {"images": ImageInputs, "texts": TextInputs}


@dataclass(frozen=True)
class Splits:
    """A data set prepared for a backbone.

    Args:
        classes: names of the labels.
        train: training samples; None if a file was not split.
        validation: validation samples; None if a file was not split.
        test: test samples.
        inputs: prepare batches, and read single samples.
    """

    classes: tuple[str, ...]
    train: Any
    validation: Any
    test: Any
    inputs: Inputs


def inputs_of(model: nn.Module, name: str, size: int | None = None, length: int | None = None) -> Inputs:
    """Return the kind of inputs that a backbone takes.

    Args:
        model: the backbone.
        name: its name, as :func:`visadapt.inject` takes it.
        size: image side in pixels; None for the side that the backbone was trained at.
        length: maximum tokens per text; None for 128.

    Raises:
        VisadaptError: a size was given for texts or a length for images, or the backbone takes neither.
    """
    if getattr(model, "main_input_name", None) == "input_ids":
        if size is not None:
            raise VisadaptError(f"{name} takes texts: give a length instead of a size")
        return TextInputs(name) if length is None else TextInputs(name, length)
    if length is not None:
        raise VisadaptError(f"{name} takes images: give a size instead of a length")
    example = guess_input(model)
    if not isinstance(example, Tensor) or example.ndim != 4:
        raise VisadaptError(f"{name} must take images or texts, got a backbone of another kind")
    published = getattr(model, "pretrained_cfg", None) or {}
    return ImageInputs(
        example.shape[-1] if size is None else size,
        tuple(published.get("mean", IMAGENET_MEAN)),
        tuple(published.get("std", IMAGENET_STD)),
    )


def described(inputs: Inputs) -> dict[str, Any]:
    """Describe inputs as JSON values, for the notes of a task file."""
    kind = next(kind for kind, form in _KINDS.items() if isinstance(inputs, form))
    return {"kind": kind, **{f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs) if f.compare}}


def from_description(description: Mapping[str, Any], *, backbone: str | None = None, online: bool = False) -> Inputs:
    """Rebuild inputs from the output of :func:`described`, as a file holds it.

    Args:
        description: output of :func:`described`.
        backbone: name of a backbone whose tokenizer is the caller's own choice: it is loaded without restrictions where
            the description names the same, and in place of a local path, which a file may not choose.
        online: whether a tokenizer that only the description names may be downloaded.

    Raises:
        VisadaptError: a field is unknown, of another type or out of bounds; a tokenizer that no file may choose.
    """
    kinds = " or ".join(_KINDS)
    if not isinstance(description, Mapping):
        raise VisadaptError(f"a description of inputs must have a kind ({kinds}) and options, got {description!r}")
    fields = {key: value for key, value in description.items() if key != "kind"}
    try:
        if "loader" in fields:
            raise TypeError("loader is not part of it")
        inputs = from_json(_KINDS[description["kind"]], fields)
    except (KeyError, TypeError) as error:
        raise VisadaptError(f"a description of inputs must have a kind ({kinds}) and options: {error}") from error
    if not isinstance(inputs, TextInputs) or inputs.tokenizer == backbone:
        return inputs
    try:
        check_tokenizer(inputs.tokenizer)
    except VisadaptError:
        if backbone is None:
            raise
        return dataclasses.replace(inputs, tokenizer=backbone)
    return dataclasses.replace(inputs, loader=partial(tokenizer, online=online))
