"""The quick setting: more epochs for small sets, smaller images for large ones."""

from __future__ import annotations

import pytest

pytest.importorskip("typer")

from visadapt.cli.quick import PIXELS, quick_recipe, quick_size
from visadapt.training import RECIPES, Recipe


@pytest.mark.parametrize(("count", "epochs"), [(20, 6), (320, 6), (500, 4), (640, 3), (10_000, 3)])
def test_small_sets_take_more_epochs(count: int, epochs: int) -> None:
    assert quick_recipe(Recipe(), count) == {"epochs": epochs, "patience": 2}


def test_a_recipe_of_many_epochs_keeps_them() -> None:
    assert quick_recipe(RECIPES["rebuffi"], 100)["epochs"] == 120


def test_images_are_as_large_as_the_work_allows() -> None:
    sizes = [quick_size(count, 6) for count in (10, 80, 200, 400, 800, 5_000)]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (224, 64)
    for count, size in zip((80, 200, 400, 800), sizes[1:], strict=False):
        assert size == 64 or count * 6 * size**2 <= PIXELS
