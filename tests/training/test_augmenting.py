"""Crops, RandAugment, mixup and CutMix of a recipe: in ``fit``, in checkpoints, and resumed with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import visadapt
from tests.models import ZOO
from tests.training.conftest import state
from tests.training.test_resume import Killed, after, without_seconds
from visadapt import VisadaptError
from visadapt.data import ImageFiles, ImageSet, normalize
from visadapt.data.image_inputs import ImageInputs
from visadapt.training import Recipe, evaluate, fit

RECIPE = Recipe(epochs=2, batch_size=16, random_crop=0.5, rand_augment="rand-m5", mixup=0.3, cutmix=1.0)


def make() -> nn.Module:
    torch.manual_seed(0)
    return visadapt.inject(ZOO["tiny/resnet"].make(), m=4, task="digits", num_classes=10)


def trained(model: nn.Module, digits: ImageSet, **options: Any) -> Any:
    data = (digits.train.subset(range(50)), digits.test.subset(range(20)))
    return fit(model, "digits", *data, **{"recipe": RECIPE, "prepare": normalize, "metric": "loss", **options})


@pytest.mark.parametrize("change", ["random_crop", "rand_augment", "mixup", "cutmix"])
def test_each_option_changes_what_is_learnt(digits: ImageSet, change: str) -> None:
    changed = {**({"random_crop": 0.5} if change == "rand_augment" else {}), change: getattr(RECIPE, change)}
    base = Recipe(epochs=1, batch_size=16, **({"random_crop": 0.5} if change == "rand_augment" else {}))
    losses = [trained(make(), digits, recipe=recipe).epochs[0].loss for recipe in (base, base.replace(**changed))]
    assert losses[0] != losses[1]
    assert trained(make(), digits, recipe=base.replace(**changed)).epochs[0].loss == losses[1]


@pytest.mark.parametrize("stop", [8, 13])
def test_resumed_with_the_same_bits(digits: ImageSet, tmp_path: Path, stop: int) -> None:
    model, again, file = make(), make(), tmp_path / "checkpoint"
    whole = trained(model, digits)
    with pytest.raises(Killed):
        trained(make(), digits, checkpoint=file, checkpoint_every=1, prepare=after(stop))
    with pytest.raises(VisadaptError, match=r"recipe: mixup was 0\.3, is 0\.2"):
        trained(make(), digits, checkpoint=file, recipe=RECIPE.replace(mixup=0.2))
    result = trained(again, digits, checkpoint=file, checkpoint_every=1)
    assert without_seconds(result) == without_seconds(whole)
    assert all(torch.equal(tensor, state(again)[name]) for name, tensor in state(model).items())


def test_images_in_files_are_read_and_cropped(digits: ImageSet) -> None:
    inputs = ImageInputs(16)
    train, test = (
        ImageFiles(part.images[:24], part.labels[:24], inputs.pixels) for part in (digits.train, digits.test)
    )
    model, recipe = make(), Recipe(epochs=1, batch_size=8, random_crop=0.5)
    result = fit(model, "digits", train, test, recipe, prepare=inputs)
    assert result.steps == 3
    whole = evaluate(model, "digits", (test.items, test.labels), prepare=inputs)
    assert evaluate(model, "digits", test, prepare=inputs) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_crop": 1.5}, r"random_crop= must be a fraction in \(0, 1\], got 1\.5"),
        ({"rand_augment": "rand-m9"}, "rand_augment= needs random_crop="),
        ({"cutmix": 11}, "cutmix= must be a number from 0 to 10, got 11"),
    ],
)
def test_a_recipe_checks_its_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(VisadaptError, match=message):
        Recipe(**options)


def test_what_cannot_be_mixed_or_cropped_is_refused_and_nothing_moves(digits: ImageSet) -> None:
    model = make()
    before = state(model)
    floats = (torch.rand(8, 3, 16, 16), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(VisadaptError, match="images for random_crop= must be uint8"):
        fit(model, "digits", floats, recipe=Recipe(epochs=1, random_crop=0.5, head_first=False))
    soft = (floats[0], torch.full((8, 10), 0.1))
    with pytest.raises(VisadaptError, match="must be one class per image"):
        fit(model, "digits", soft, recipe=Recipe(epochs=1, mixup=0.5, head_first=False), loss="cross_entropy")
    assert all(torch.equal(tensor, state(model)[name]) for name, tensor in before.items())
    fit(model, "digits", floats, recipe=Recipe(epochs=1, mixup=0.5, cutmix=0.5))  # floats can be mixed
