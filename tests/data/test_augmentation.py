"""Random changes of training images: timm's, reproducible, and mixed labels that add up."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visadapt.data.augmentation import Augmentation
from visadapt.data.image_inputs import ImageInputs
from visadapt.errors import VisadaptError
from visadapt.training import Recipe
from visadapt.training.augmenting import training_batches

INPUTS = ImageInputs(16, crop_pct=0.9, interpolation="bicubic", crop_mode="center")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        for i in range(7):
            Image.fromarray(rng.integers(0, 256, (30, 24, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    return tmp_path


CHANGES = (
    Augmentation(random_crop=0.3),
    Augmentation(random_crop=0.3, rand_augment="rand-m9-mstd0.5"),
    Augmentation(mixup=0.5),
    Augmentation(random_crop=0.5, mixup=0.2, cutmix=1.0),
)


def changed(augmentation: Augmentation, images: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    noise, labels = torch.Generator().manual_seed(seed), torch.arange(len(images)) % 3
    if augmentation.crops:
        images = augmentation.cropped(images, INPUTS, noise)
    return augmentation.mixed(images, labels, 3, noise) if augmentation.mixes else (images, labels)


@pytest.mark.parametrize("augmentation", CHANGES, ids=str)
def test_changes_of_batches_draw_from_one_generator(augmentation: Augmentation) -> None:
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    kept = images.clone()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    (first, labels), (again, same_labels), (other, _) = (changed(augmentation, images, seed) for seed in (0, 0, 1))
    assert torch.equal(images, kept), "the caller's images are not written to"
    assert (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())[1:] == before[1:]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert first.dtype == torch.uint8
    assert first.shape == images.shape
    assert torch.equal(first, again)
    assert torch.equal(labels, same_labels)
    assert not torch.equal(first, other)
    if augmentation.mixes:
        torch.testing.assert_close(labels.sum(1), torch.ones(5))
        assert ((labels > 0) & (labels < 1)).any()
        assert labels[4].tolist() == [0, 1, 0], "the odd sample of a batch is not mixed"


def test_images_in_files_are_cropped_from_the_whole_file(folder: Path) -> None:
    files = INPUTS.load(str(folder), training=INPUTS.pixels).train
    recipe = Recipe(random_crop=0.3, batch_size=5)
    first, again = (list(training_batches(files, recipe, INPUTS, 0)) for _ in range(2))
    plain = list(training_batches(files, recipe.replace(random_crop=None), INPUTS, 0))
    assert sum(len(labels) for _, labels in first) == 16
    assert first[0][0].shape == (5, 3, 16, 16)
    assert all(torch.equal(one[0], two[0]) for one, two in zip(first, again, strict=True))
    assert torch.equal(first[0][1], plain[0][1])
    assert not torch.equal(first[0][0], plain[0][0])
    with pytest.raises(VisadaptError, match="prepare= must be the backbone's inputs for random_crop="):
        training_batches(files, recipe, None, 0)


def test_forms_that_cannot_be_changed() -> None:
    noise = torch.Generator()
    with pytest.raises(VisadaptError, match=r"images for random_crop= must be uint8 \(N, 3, H, W\), got torch.float32"):
        Augmentation(random_crop=0.3).cropped(torch.rand(2, 3, 8, 8), None, noise)
    with pytest.raises(VisadaptError, match=r"must be one class per image, got torch.float32 of \(2,\)"):
        Augmentation(mixup=0.3).mixed(torch.rand(2, 3, 8, 8), torch.rand(2), 3, noise)
    with pytest.raises(VisadaptError, match="must be images"):
        Augmentation(mixup=0.3).mixed({"a": 1}, torch.zeros(2).long(), 3, noise)


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
