"""Problems of image classification."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visadapt.checks import check_choice
from visadapt.data import ImageSet, ImageSplit, augment, load_squares
from visadapt.data.bounded import unpack_zip
from visadapt.data.image_sources import BUNDLED
from visadapt.data.inputs import ImageInputs, Splits
from visadapt.data.tables import is_table
from visadapt.experiments.problems import Problem, subset_indices
from visadapt.training import Samples
from visadapt.training.augmenting import Augment

AUGMENTATIONS = ("shift", "shift and mirror")
"""How training images may be changed at random."""


@dataclass(frozen=True)
class ImageProblem(Problem):
    """A data set of images, as `visadapt.data.load_images` loads it, or a zip file of such a folder.

    Args:
        network: name of the backbone, or path of a file; see `visadapt.experiments.networks.network`.
        data: name or path of the data set.
        train: number of training images; None for all that are not held out.
        validation: number of images of the set's own validation split, or held out from the training images where it
            has none; None for all of its own, or for a fifth of the training images, at most 500.
        test: number of test images; None for all.
        root: folder that contains the data set, if ``data`` is relative to one.
        options: options of the backbone's builder, as pairs.
        table: options of a table's columns and labels, as pairs, as `visadapt.data.load_images` takes them.
        scored_by: metric that chooses and is reported; None for the usual one of such labels.
        size: side in pixels that images are resized to; images that are not square are cropped to their centre.
        augment: ``shift`` to move training images at random by up to an eighth of their side, ``shift and mirror`` to
            mirror half of them too, which is wrong where left and right differ in meaning, as in signs and characters;
            None for neither. All contenders get the same.

    Raises:
        VisadaptError: the augmentation is unknown.

    Examples:
        >>> from visadapt.experiments import ImageProblem
        >>> problem = ImageProblem("timm/resnet18", "digits", train=500, size=32, augment="shift")
        >>> problem.name, problem.modality, problem.metric
        ('digits', 'image', 'accuracy')
    """

    size: int = 64
    augment: str | None = None

    modality: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augment is not None:
            check_choice(self.augment, AUGMENTATIONS, "augmentation")

    @property
    def uses_root(self) -> bool:
        # a table names its images from there, wherever it is
        absolute = Path(self.data).is_absolute() and not is_table(Path(self.data))
        return not (self.data in BUNDLED or self.data.startswith("hf/") or absolute)

    def described(self) -> dict[str, Any]:
        facts = super().described()
        if self.augment is None:
            # results from before there was augmentation keep their keys
            del facts["augment"]
        if is_table(Path(self.data)):
            # the table's contents are only the names of its images
            facts["images"] = _digest(self)
        return facts

    def augmentation(self) -> Augment | None:
        if self.augment is None:
            return None
        shift = max(1, self.splits.train.inputs.shape[-1] // 8)
        return partial(augment, flip=self.augment != AUGMENTATIONS[0], crop_padding=shift)

    def load(self) -> Splits:
        data = self._read()
        rest, validation = self._held_out(data)
        return Splits(
            data.classes,
            _samples(rest.subset(subset_indices(len(rest), self.train))),
            _samples(validation),
            _samples(data.test if self.test is None else data.test.subset(subset_indices(len(data.test), self.test))),
            ImageInputs(self.size),
            data.remarks,
        )

    def _held_out(self, data: ImageSet) -> tuple[ImageSplit, ImageSplit]:
        if data.validation is not None:
            return data.train, data.validation.subset(subset_indices(len(data.validation), self.validation))
        return data.holdout(self.validation or max(1, min(500, len(data.train) // 5)))

    def _read(self) -> ImageSet:
        path, table = Path(self.root or "", self.data), dict(self.table)
        if not os.path.exists(path) or (Path(self.data).is_absolute() and is_table(path)):
            return load_squares(self.data, self.size, root=self.root if self.uses_root else None, **table)
        if not zipfile.is_zipfile(path):
            return load_squares(path, self.size, **table)
        with tempfile.TemporaryDirectory() as folder:
            unpack_zip(path, Path(folder))
            train_folders = (train for train in sorted(Path(folder).rglob("train")) if train.is_dir())
            return load_squares(next((train.parent for train in train_folders), Path(folder)), self.size, **table)

    def fresh(self) -> nn.Module:
        # convolutions are fastest in this format; all contenders use it
        return super().fresh().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def prepare(self, batch: Tensor) -> Tensor:
        return ImageInputs(self.size)(batch).contiguous(memory_format=torch.channels_last)


@lru_cache(maxsize=32)
def _digest(problem: ImageProblem) -> str:
    splits = problem.splits
    sha = hashlib.sha256()
    for samples in (splits.train, splits.validation, splits.test):
        sha.update(samples.inputs.numpy().tobytes())
    return sha.hexdigest()[:16]


def _samples(split: ImageSplit) -> Samples:
    return Samples(split.images, split.labels)
