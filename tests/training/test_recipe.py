"""Recipes: exact schedules, which parameters decay, and values that are refused."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import visadapt
from tests.models import ZOO
from visadapt import VisadaptError
from visadapt.training import RECIPES, SCHEDULES, Recipe
from visadapt.training.target import target_of


def rates(recipe: Recipe, steps: int) -> list[float]:
    model = nn.Linear(2, 2, bias=False)
    optimizer, schedule = recipe.make_optimizer(target_of(model, None), steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        model.weight.grad = torch.zeros(2, 2)
        optimizer.step()
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


def test_step_schedule_falls_to_a_tenth_at_each_milestone() -> None:
    recipe = RECIPES["rebuffi"]
    seen = rates(recipe, 120 * 3)
    assert seen == pytest.approx([0.1] * 240 + [0.01] * 60 + [0.001] * 60, rel=1e-12)


def test_rebuffis_recipe_is_sgd_with_momentum_and_a_decay_per_role() -> None:
    torch.manual_seed(0)
    model = visadapt.inject(ZOO["tiny/resnet"].make(), visadapt.Parallel(), task="a", num_classes=3)
    target = target_of(model, "a")
    optimizer, schedule = RECIPES["rebuffi"].make_optimizer(target, 300)
    expected = {name: p.detach().clone() for name, p in target.parameters.items()}
    speed = {name: torch.zeros_like(p) for name, p in expected.items()}
    for _ in range(2):
        for name, p in target.parameters.items():
            p.grad = torch.randn_like(p)
            decay = 2e-3 if name.endswith("parallel.full.weight") else 5e-4 if name.endswith("head.weight") else 0.0
            speed[name] = 0.9 * speed[name] + p.grad + decay * expected[name]
            expected[name] = expected[name] - 0.1 * speed[name]
        optimizer.step()
        schedule.step()
    assert any(name.endswith("parallel.full.weight") for name in expected)
    for name, p in target.parameters.items():
        torch.testing.assert_close(p.detach(), expected[name])


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
    target = target_of(model, "default")
    recipe = Recipe(lr=1e-2, head_lr=3e-2, norm_lr=5e-2, weight_decay=0.3, adapter_decay=0.7)
    optimizer, _ = recipe.make_optimizer(target, 10)
    group = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert len(group) == len(target.parameters) == len(visadapt.parameters(model, "default"))
    for key, parameter in target.parameters.items():
        adapter = key.endswith((".down.weight", ".up.weight", ".depthwise.weight"))
        decay = 0.7 if adapter else 0.3 if key.endswith("head.weight") else 0.0
        assert group[id(parameter)]["weight_decay"] == decay, key
        rate = 3e-2 if ".head." in f".{key}" else 5e-2 if ".norm." in f".{key}" else 1e-2
        assert group[id(parameter)]["initial_lr"] == rate, key
    assert any(key.endswith(".norm.weight") for key in target.norms)
    assert any(key.endswith("up.weight") for key in target.parameters)


def test_norms_of_a_plain_network_do_not_decay_either() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm((4, 8, 8)), nn.Flatten(), nn.Linear(9, 2))
    target = target_of(model, None)
    optimizer, _ = Recipe(weight_decay=0.3, adapter_decay=0.7).make_optimizer(target, 10)
    decays = {id(p): g["weight_decay"] > 0 for g in optimizer.param_groups for p in g["params"]}
    # the weight of a LayerNorm over maps has three dimensions and still does not decay
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
        ("adapter_decay", -1),
        ("momentum", 1.0),
        ("patience", 0),
        ("milestones", (0.9, 0.5)),
        ("milestones", (1.0,)),
        ("betas", (0.9,)),
        ("betas", (0.9, 1.0)),
        ("eps", 0),
        ("grad_clip", 0),
        ("label_smoothing", 1),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(VisadaptError, match=rf"^{field} (is|are|must be) .*got {re.escape(repr(value))}$"):
        Recipe(**{field: value})


def test_a_misspelt_schedule_names_the_nearest() -> None:
    with pytest.raises(VisadaptError, match=r"no schedule 'cosin'; did you mean 'cosine'\?"):
        Recipe(schedule="cosin")
    with pytest.raises(VisadaptError, match=r"no optimizer 'adam'; did you mean 'adamw'\?"):
        Recipe(optimizer="adam")
    with pytest.raises(VisadaptError, match="grad_clip"):
        Recipe().replace(grad_clip=-1.0)
