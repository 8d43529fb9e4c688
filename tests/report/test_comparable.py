"""Only comparable results are averaged over seeds."""

from __future__ import annotations

import pytest

from tests.report import fake_results
from tests.report.test_sections import at
from visadapt import VisadaptError
from visadapt.experiments import Result
from visadapt.report import build
from visadapt.report.comparable import drop_superseded


def trials_at(rates: dict[float, float], **more) -> list[Result]:
    """Build trials of the first seed on validation data, from scores in % by learning rate."""
    return [at("compare", "lora", score, split="validation", lr=rate, **more) for rate, score in rates.items()]


def final(rate: float, seed: int = 0, **more) -> Result:
    return at("compare", "lora", 80, seed=seed, lr=rate, **more)


def test_comparable_results_of_every_experiment_are_unchanged() -> None:
    assert drop_superseded(fake_results.all_results()) == fake_results.all_results()


@pytest.mark.parametrize("experiment", ["compare", "ablation", "transfer"])
def test_results_of_two_settings_are_refused(experiment: str) -> None:
    split = "validation" if experiment == "ablation" else "test"
    results = [at(experiment, "lora", 80, seed=seed, split=split, setting=f"s{seed}") for seed in (0, 1)]
    message = f"results of {experiment} for lora on resnet50, cifar10 have several settings: .* in separate folders"
    with pytest.raises(VisadaptError, match=message):
        build(results)


def test_results_of_two_regimes_are_refused() -> None:
    results = [at("compare", "lora", 80, seed=seed, regime=regime) for seed, regime in enumerate(("cpu", "cuda"))]
    with pytest.raises(VisadaptError, match="the results are of regimes cpu and cuda"):
        build(results)
    with pytest.raises(VisadaptError, match="the results are of regimes cpu and none"):
        build([results[0], at("compare", "lora", 80, seed=1)])


def test_a_rate_may_have_several_numbers_of_epochs() -> None:
    trials = [*trials_at({1e-3: 81}), *trials_at({1e-3: 84}, epochs=9)]
    old, new = [final(1e-3, seed) for seed in (0, 1)], [final(1e-3, seed, epochs=9) for seed in (0, 1)]
    assert drop_superseded([*trials, *old, *new]) == [*trials, *new]


def test_other_coordinates_may_have_another_setting() -> None:
    results = [
        at("init_scale", "b", 80, split="validation", facts={"std": std}, setting=f"s{std}") for std in (1e-2, 1e-1)
    ]
    assert drop_superseded(results) == results


def test_measured_facts_are_not_coordinates() -> None:
    facts = [{"first": 0, "last": 0, "norms": "kept", "majority": majority} for majority in (0.5, 0.6)]
    results = [at("ablation", "lora", 80, split="validation", facts=each) for each in facts]
    with pytest.raises(
        VisadaptError, match=r"ablation for lora on resnet50, cifar10 have seed 0 at lr 0.001 more than"
    ):
        drop_superseded(results)


def test_an_older_result_without_a_setting_is_comparable_with_any() -> None:
    results = [final(1e-3, 0, setting=None), final(1e-3, 1, setting="s1"), final(1e-3, 2, setting="s1")]
    assert drop_superseded(results) == results


def test_the_same_seed_twice_is_refused() -> None:
    results = [final(1e-3, setting=setting) for setting in (None, "s1")]
    with pytest.raises(VisadaptError, match=r"have seed 0 at lr 0.001 more than once"):
        drop_superseded(results)


def test_a_rate_that_a_longer_sweep_no_longer_chooses_is_left_out() -> None:
    trials = trials_at({1e-3: 81, 3e-3: 80, 1e-2: 84})
    old, new = [final(1e-3, seed) for seed in (0, 1)], [final(1e-2, seed) for seed in (0, 1)]
    assert drop_superseded([*trials, *old, *new]) == [*trials, *new]
    diverged = trials_at({3e-2: 99}, facts={"stopped": "the loss became nan"})
    assert drop_superseded([*trials, *diverged, *old, *new]) == [*trials, *diverged, *new]


def test_the_first_seed_chooses_as_in_the_experiment() -> None:
    trials = [*trials_at({1e-3: 81, 1e-2: 84}), *trials_at({1e-3: 90}, seed=1)]
    assert drop_superseded([*trials, final(1e-3), final(1e-2)]) == [*trials, final(1e-2)]


def test_several_rates_without_validation_results_are_refused() -> None:
    message = "have one seed at lr 0.001 and 0.01, and no validation results to choose between them"
    for trials in ([], trials_at({1e-3: 80})):
        with pytest.raises(VisadaptError, match=message):
            drop_superseded([*trials, final(1e-3), final(1e-2)])
