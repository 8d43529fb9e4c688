"""Problems of image classification."""

from __future__ import annotations

import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from visadapt.data import ImageSet, ImageSplit, load_squares, normalize
from visadapt.experiments.problems import Problem, Splits, drawn
from visadapt.training import Samples


@dataclass(frozen=True)
class ImageProblem(Problem):
    """Images, as :func:`visadapt.data.load_images` loads them; its folders may also come as a zip file.

    Args:
        train: number of training images; None for all but those held out.
        validation: number of images held out from training.
        size: side in pixels that images are resized to; of those that are not square, the centre.
    """

    validation: int = 500
    size: int = 64

    modality: ClassVar[str] = "image"

    def load(self) -> Splits:
        data = self._read()
        rest, validation = data.holdout(self.validation)
        return Splits(
            data.classes,
            _samples(rest.subset(drawn(len(rest), self.train))),
            _samples(validation),
            _samples(data.test if self.test is None else data.test.subset(drawn(len(data.test), self.test))),
        )

    def _read(self) -> ImageSet:
        place = Path(self.root or "", self.data)
        if not place.exists():
            return load_squares(self.data, self.size, root=self.root)
        if not zipfile.is_zipfile(place):
            return load_squares(place, self.size)
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(place) as archive:
            archive.extractall(folder)
            inner = next(
                (found.parent for found in sorted(Path(folder).rglob("train")) if found.is_dir()), Path(folder)
            )
            return load_squares(inner, self.size)

    def fresh(self) -> nn.Module:
        # the memory format that convolutions are quickest in, for every contender
        return super().fresh().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def prepare(self, batch: Tensor) -> Tensor:
        return normalize(batch, self.size).contiguous(memory_format=torch.channels_last)


def _samples(split: ImageSplit) -> Samples:
    return Samples(split.images, split.labels)
