"""Whether results are each other's seeds, which is what a report takes the mean of."""

from __future__ import annotations

import pytest

from tests.report import fake_results
from tests.report.test_sections import at
from visadapt import VisadaptError
from visadapt.experiments import Result
from visadapt.report import build
from visadapt.report.comparable import settled


def tried(rates: dict[float, float], **more) -> list[Result]:
    """Trials of the first seed on validation data: score in % by learning rate."""
    return [at("compare", "lora", score, split="validation", lr=rate, **more) for rate, score in rates.items()]


def final(rate: float, seed: int = 0, **more) -> Result:
    return at("compare", "lora", 80, seed=seed, lr=rate, **more)


def test_results_of_every_experiment_are_left_as_they_are() -> None:
    assert settled(fake_results.every()) == fake_results.every()


@pytest.mark.parametrize("experiment", ["compare", "ablation", "transfer"])
def test_results_of_two_settings_are_no_seeds(experiment: str) -> None:
    split = "validation" if experiment == "ablation" else "test"
    results = [at(experiment, "lora", 80, seed=seed, split=split, setting=f"s{seed}") for seed in (0, 1)]
    said = f"results of {experiment} for lora on resnet50, cifar10 are of several settings: .* in folders of their own"
    with pytest.raises(VisadaptError, match=said):
        build(results)


def test_a_setting_is_another_for_another_question() -> None:
    results = [
        at("init_scale", "b", 80, split="validation", facts={"std": std}, setting=f"s{std}") for std in (1e-2, 1e-1)
    ]
    assert settled(results) == results


def test_what_a_measurement_finds_makes_no_other_question() -> None:
    facts = [{"first": 0, "last": 0, "norms": "kept", "majority": majority} for majority in (0.5, 0.6)]
    results = [at("ablation", "lora", 80, split="validation", facts=each) for each in facts]
    with pytest.raises(
        VisadaptError, match=r"ablation for lora on resnet50, cifar10 have seed 0 at lr 0.001 more than"
    ):
        settled(results)


def test_an_older_result_goes_with_any_setting() -> None:
    results = [final(1e-3, 0, setting=None), final(1e-3, 1, setting="s1"), final(1e-3, 2, setting="s1")]
    assert settled(results) == results


def test_one_seed_twice_is_two_settings_where_these_are_not_known() -> None:
    results = [final(1e-3, setting=setting) for setting in (None, "s1")]
    with pytest.raises(VisadaptError, match=r"have seed 0 at lr 0.001 more than once"):
        settled(results)


def test_a_rate_that_a_longer_sweep_gave_up_is_left_out() -> None:
    trials = tried({1e-3: 81, 3e-3: 80, 1e-2: 84})
    old, new = [final(1e-3, seed) for seed in (0, 1)], [final(1e-2, seed) for seed in (0, 1)]
    assert settled([*trials, *old, *new]) == [*trials, *new]
    diverged = tried({3e-2: 99}, facts={"stopped": "the loss became nan"})
    assert settled([*trials, *diverged, *old, *new]) == [*trials, *diverged, *new]


def test_the_first_seed_chooses_as_in_the_experiment() -> None:
    trials = [*tried({1e-3: 81, 1e-2: 84}), *tried({1e-3: 90}, seed=1)]
    assert settled([*trials, final(1e-3), final(1e-2)]) == [*trials, final(1e-2)]


def test_where_nothing_tells_which_rate_to_take_none_is_taken() -> None:
    said = "have one seed at lr 0.001 and 0.01, and validation data does not say which to take"
    for trials in ([], tried({1e-3: 80})):
        with pytest.raises(VisadaptError, match=said):
            settled([*trials, final(1e-3), final(1e-2)])
