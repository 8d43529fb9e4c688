"""The method to take: paired differences, their intervals, and the rule that picks one."""

from __future__ import annotations

import dataclasses

import pytest

from tests.report import fake_results
from visadapt.experiments.record import Result
from visadapt.report.advice import advice, against_full, budgets, lead
from visadapt.report.statistics import interval, t_quantile

SEEDS = range(3)
PROBLEMS = ("a", "b", "c")


def runs(name: str, points: float, trained: int, spread: float = 0.0) -> list[Result]:
    """Make test results that are ``points`` above 50 %, with a spread over seeds."""
    return [
        dataclasses.replace(
            fake_results.result("compare", "resnet50", problem, name, seed, 0),
            score=0.5 + (points + spread * (seed - 1)) / 100,
            trained=trained,
        )
        for problem in PROBLEMS
        for seed in SEEDS
    ]


FULL = runs("full fine-tuning", 0, 1000)


def test_an_interval_holds_the_mean_and_narrows_with_agreement() -> None:
    wide, narrow = interval([-3.0, 0.0, 3.0]), interval([0.9, 1.0, 1.1])
    assert wide[0] < 0 < wide[1]
    # Student's t: 1 ± 4.3027 · 0.1 / √3
    assert narrow == pytest.approx((0.7516, 1.2484), abs=1e-4)
    assert interval([2.0, 2.0]) == (2.0, 2.0)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (26, 2.0555), (100, 1.9840)])
def test_quantiles_of_students_distribution(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=1e-4)


def test_differences_are_paired_by_problem_and_seed() -> None:
    noisy = [dataclasses.replace(r, score=r.score + 0.1 * r.seed) for r in (*FULL, *runs("lora r=8", 1, 10))]
    (comparison,) = against_full(noisy)
    assert comparison.points == pytest.approx(1)
    assert comparison.low == pytest.approx(comparison.high)
    assert comparison.pairs == 9


@pytest.mark.parametrize(
    ("contenders", "taken", "verdict"),
    [
        ({"lora r=8": (-1, 10, 0), "bottleneck m=8": (2, 20, 0), "series": (4, 90, 0)}, "bottleneck m=8", "above"),
        ({"lora r=8": (-3, 10, 0), "bottleneck m=8": (0.1, 20, 4)}, "bottleneck m=8", "no difference could be seen"),
        ({"lora r=8": (-3, 10, 0), "bottleneck m=8": (-5, 20, 0)}, "lora r=8", "below"),
        # surely within one point; a wide interval recommends nothing
        ({"lora r=8": (-2, 10, 9), "bottleneck m=8": (-0.1, 20, 0.5)}, "bottleneck m=8", "no difference could be seen"),
        ({"lora r=8": (-0.5, 10, 0.1), "bottleneck m=8": (-0.1, 20, 0.5)}, "lora r=8", "below"),
    ],
)
def test_the_smallest_that_is_as_good_is_taken(contenders, taken, verdict) -> None:
    results = [*FULL, *(r for name, values in contenders.items() for r in runs(name, *values))]
    assert {c.name: c.verdict for c in against_full(results)}[taken] == verdict
    table = advice(results)
    assert table is not None
    assert [row[:2] for row in table.rows] == [("resnet50", taken)]


def test_one_sample_of_a_small_test_set_is_no_difference() -> None:
    # all three seeds of a problem have the same sample wrong: the spread over seeds alone would be zero
    def measured(samples: int) -> list[Result]:
        one = [r for r in (*FULL, *runs("lora r=8", -100 / 12, 10)) if r.problem == "a"]
        return [dataclasses.replace(r, samples=samples) for r in one]

    verdicts = {n: against_full(measured(n))[0] for n in (12, 1200)}
    assert verdicts[12].verdict == "no difference could be seen"
    # 1.96 · √((1/12 − 1/144) / 12)
    assert verdicts[12].high == pytest.approx(-100 / 12 + 15.64, abs=0.01)
    assert verdicts[1200].verdict == "below"
    correlation = [dataclasses.replace(r, metric="pearson") for r in measured(12)]
    assert against_full(correlation)[0].verdict == "below", "nothing is known of how other metrics vary"


def test_methods_are_compared_on_the_problems_that_they_share() -> None:
    partial = [r for r in runs("lora r=8", 5, 10) if r.problem != "c"]
    (comparison,) = against_full([*FULL, *partial, *runs("series", 1, 90)])
    assert (comparison.name, comparison.problems, comparison.pairs) == ("series", 3, 9)
    # of a run that was interrupted, on those that were finished
    probe = [r for r in runs("linear probe", -9, 0) if r.problem != "b"]
    (comparison,) = against_full([*FULL, *partial, *probe])
    assert (comparison.name, comparison.problems, comparison.pairs) == ("lora r=8", 2, 6)
    assert advice(runs("lora r=8", 5, 10)) is None


def test_the_best_within_a_budget_is_chosen_on_validation_data() -> None:
    def both(name: str, points: float, chosen_by: float, trained: int) -> list[Result]:
        tests = runs(name, points, trained)
        trials = [dataclasses.replace(r, split="validation", score=0.5 + chosen_by / 100, seed=0) for r in tests]
        return [*tests, *trials[::3]]

    size = fake_results.SIZES["resnet50"]
    contenders = [
        *both("linear probe", -5, -5, 0),
        *both("norms only", -2, -2, size // 1000),
        *both("lora r=8", 1, -3, size // 500),
        *both("bottleneck m=8", 0, 1, size // 100),
    ]
    results = [*FULL, *contenders]
    table = budgets(results)
    assert table is not None
    assert [row[1:3] for row in table.rows] == [("0.1 %", "norms only"), ("1.5 %", "bottleneck m=8")]
    assert "on validation data" in table.title
    # without validation results, by the test results
    table = budgets([r for r in results if r.split == "test" or r.contender != "lora r=8"])
    assert table is not None
    assert [row[1:3] for row in table.rows] == [("0.1 %", "norms only"), ("0.5 %", "lora r=8")]
    assert "on test data for resnet50" in table.title


def test_the_lead_says_what_to_take() -> None:
    (sentence,) = lead([*FULL, *runs("lora r=8", -1, 10)])
    assert sentence == (
        "On resnet50, take lora r=8: it trains 0.00 % of the backbone, and it is worse than full fine-tuning (−1.0 "
        "points, 95 % interval −1.0 to −1.0, 3 problems, 9 pairs)."
    )
    assert lead(runs("lora r=8", -1, 10)) == ()
