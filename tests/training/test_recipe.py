"""The recipe: exact schedules, who decays and who does not, values that are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import visadapt
from tests.zoo import ZOO
from visadapt import VisadaptError
from visadapt.training import SCHEDULES, Recipe
from visadapt.training.trainee import trainee


def rates(recipe: Recipe, steps: int) -> list[float]:
    weight = nn.Parameter(torch.zeros(2, 2))
    optimiser, schedule = recipe.optimiser([("w", weight)], steps, set(), set())
    seen = []
    for _ in range(steps):
        seen.append(optimiser.param_groups[0]["lr"])
        weight.grad = torch.zeros(2, 2)
        optimiser.step()
        schedule.step()
    return seen


def test_linear_schedule_is_exact_at_every_step() -> None:
    # 20 steps, 2 of them warm-up: thirds of the peak, the peak, then eighteenths down
    seen = rates(Recipe(lr=1.8), 20)
    assert seen == pytest.approx([0.6, 1.2] + [1.8 * (18 - k) / 18 for k in range(18)], rel=1e-12)
    assert seen[2] == 1.8
    assert Recipe().factor(20, 20) == 0


def test_cosine_and_constant_schedules() -> None:
    cosine = Recipe(schedule="cosine", warmup=0.5)
    assert [cosine.factor(s, 4) for s in range(5)] == pytest.approx([1 / 3, 2 / 3, 1, 0.5, 0], abs=1e-15)
    assert cosine.factor(7, 12) == pytest.approx(0.5 * (1 + math.cos(math.pi / 6)))
    assert [Recipe(schedule="constant", warmup=0).factor(s, 3) for s in range(4)] == [1, 1, 1, 1]


@given(steps=st.integers(1, 400), warmup=st.floats(0, 0.99), schedule=st.sampled_from(SCHEDULES))
def test_every_step_moves_and_none_exceeds_the_peak(steps: int, warmup: float, schedule: str) -> None:
    recipe = Recipe(warmup=warmup, schedule=schedule)
    factors = [recipe.factor(step, steps) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    warm = round(warmup * steps)
    assert factors[:warm] == sorted(factors[:warm])
    assert factors[warm:] == sorted(factors[warm:], reverse=True)


@pytest.mark.parametrize("name", ["tiny/resnet", "tiny/vgg_bn"])
def test_rates_and_decay_of_adapters_norms_and_head(name: str) -> None:
    model = visadapt.inject(ZOO[name].make(), visadapt.Bottleneck(4, depthwise=True), num_classes=3)
    chosen = trainee(model, "default")
    recipe = Recipe(lr=1e-2, head_lr=3e-2, norm_lr=5e-2, weight_decay=0.3)
    optimiser, _ = recipe.optimiser(chosen.parameters.items(), 10, chosen.norms, chosen.head)
    group = {id(p): g for g in optimiser.param_groups for p in g["params"]}
    assert len(group) == len(chosen.parameters) == len(visadapt.parameters(model, "default"))
    for key, parameter in chosen.parameters.items():
        matrix = key.endswith((".down.weight", ".up.weight", ".depthwise.weight", "head.weight"))
        assert group[id(parameter)]["weight_decay"] == (0.3 if matrix else 0.0), key
        rate = 3e-2 if ".head." in f".{key}" else 5e-2 if ".norm." in f".{key}" else 1e-2
        assert group[id(parameter)]["initial_lr"] == rate, key
    assert any(key.endswith(".norm.weight") for key in chosen.norms)
    assert any(key.endswith("up.weight") for key in chosen.parameters)


def test_norms_of_a_plain_network_do_not_decay_either() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm((4, 8, 8)), nn.Flatten(), nn.Linear(9, 2))
    chosen = trainee(model, None)
    optimiser, _ = Recipe(weight_decay=0.3).optimiser(chosen.parameters.items(), 10, chosen.norms, chosen.head)
    decays = {id(p): g["weight_decay"] > 0 for g in optimiser.param_groups for p in g["params"]}
    # a LayerNorm over maps has a weight of three dimensions, and is a norm all the same
    assert [name for name, p in model.named_parameters() if decays[id(p)]] == ["0.weight", "4.weight"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 2.5),
        ("epochs", True),
        ("batch_size", -1),
        ("lr", 0),
        ("lr", -1e-3),
        ("lr", float("nan")),
        ("lr", "1e-3"),
        ("head_lr", 0.0),
        ("norm_lr", -1e-3),
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("weight_decay", -1),
        ("weight_decay", math.inf),
        ("betas", (0.9,)),
        ("betas", (0.9, 1.0)),
        ("eps", 0),
        ("grad_clip", 0),
        ("label_smoothing", 1),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(VisadaptError, match=f"{field} (is|are)"):
        Recipe(**{field: value})


def test_a_misspelt_schedule_names_the_nearest() -> None:
    with pytest.raises(VisadaptError, match=r"no schedule 'cosin'; did you mean 'cosine'\?"):
        Recipe(schedule="cosin")
    with pytest.raises(VisadaptError, match="grad_clip"):
        Recipe().replace(grad_clip=-1.0)
