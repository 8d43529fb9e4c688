"""Random changes of training images: timm's, reproducible, and mixed labels that add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visadapt.data.augmentation import Augmentation
from visadapt.data.image_inputs import ImageInputs
from visadapt.errors import VisadaptError

INPUTS = ImageInputs(16, crop_pct=0.9, interpolation="bicubic", crop_mode="center")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        for i in range(7):
            Image.fromarray(rng.integers(0, 256, (30, 24, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def epochs(folder: Path, augmentation: Augmentation, seed: int = 0, count: int = 1) -> list[Any]:
    splits = INPUTS.load(str(folder), training=augmentation.pixels(INPUTS))
    loader = splits.train.batches(5, shuffle=True, seed=seed, collate=augmentation.collate(3))
    return [list(loader) for _ in range(count)]


CHANGES = (
    Augmentation(random_crop=0.3),
    Augmentation(random_crop=0.3, rand_augment="rand-m9-mstd0.5"),
    Augmentation(mixup=0.5),
    Augmentation(random_crop=0.5, mixup=0.2, cutmix=1.0),
)


@pytest.mark.parametrize("augmentation", CHANGES, ids=str)
def test_changes_are_reproducible_and_new_in_each_epoch(folder: Path, augmentation: Augmentation) -> None:
    first, second = epochs(folder, augmentation, count=2)
    (again,) = epochs(folder, augmentation)
    for (images, labels), (same_images, same_labels) in zip(first, again, strict=True):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 16, 16)
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    assert sum(len(labels) for _, labels in first) == 16, "the odd sample of the last batch is not lost"
    assert not torch.equal(first[0][0], second[0][0])
    if augmentation.mixup:
        labels = torch.cat([labels for _, labels in first])
        assert labels.shape == (16, 3)
        torch.testing.assert_close(labels.sum(1), torch.ones(16))
        assert ((labels > 0) & (labels < 1)).any()


def test_nothing_changes_without_an_option() -> None:
    assert Augmentation().pixels(INPUTS) is None
    assert Augmentation(random_crop=0.3).collate(3) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_crop": 0.0}, r"random_crop= must be a fraction in \(0, 1\], got 0.0"),
        ({"rand_augment": "rand-m9"}, "rand_augment= needs random_crop="),
        ({"mixup": -1.0}, "mixup= must be a number from 0 to 10"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(VisadaptError, match=message):
        Augmentation(**options)


def test_a_configuration_that_timm_does_not_know() -> None:
    with pytest.raises(VisadaptError, match="rand_augment= must be a configuration of timm"):
        Augmentation(random_crop=0.3, rand_augment="bogus").pixels(INPUTS)
