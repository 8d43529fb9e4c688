"""How a contender's rate, epochs and variant are chosen, and what a fair comparison consists of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from tests.experiments.conftest import small
from tests.report import fake_results
from visadapt import VisadaptError
from visadapt.experiments import Compare, Contender, Result, contender, run_experiment
from visadapt.experiments.choice import MAX_EXTENSIONS, choose, next_rate
from visadapt.experiments.duration import by_problem, finished, forecast, readable
from visadapt.experiments.fair import (
    COMPARED,
    LENGTHS,
    comparisons,
    costs,
    fair_contender,
    lengths_of,
    matched,
    trained_fraction,
)
from visadapt.experiments.problem_names import problem
from visadapt.experiments.run import TrainingRun
from visadapt.methods import Bottleneck
from visadapt.report import build, sweep_table
from visadapt.report.paired import paired_tables, untrained


def scored(score: Callable[[Contender], float]) -> Callable[[Contender], Result]:
    return lambda each: fake_results.result("compare", "resnet50", "cifar10", each.name, 0, 0, score=score(each))


BASE = dataclasses.replace(contender("lora r=8"), rates=(1e-3, 3e-3, 1e-2), extend=True, lengths=(3, 9, 20))


def tried(candidates: list[Contender]) -> list[tuple[float, int]]:
    return [(each.recipe.lr, each.recipe.epochs) for each in candidates]


def test_the_grid_extends_itself_while_its_best_is_at_an_edge() -> None:
    candidates, chosen = choose(BASE, scored(lambda each: 1 - abs(each.recipe.lr - 0.1)))
    assert tried(candidates)[3:6] == [(3e-2, 3), (1e-1, 3), (3e-1, 3)]
    assert chosen is not None
    assert chosen.recipe.lr == 1e-1
    candidates, chosen = choose(BASE, scored(lambda each: 1 - each.recipe.lr))
    assert len({rate for rate, _ in tried(candidates)}) == len(BASE.rates) + MAX_EXTENSIONS
    assert chosen is not None
    assert chosen.recipe.lr == 1e-5
    fixed = dataclasses.replace(BASE, extend=False)
    assert choose(fixed, scored(lambda each: 1 - each.recipe.lr))[1].recipe.lr == 1e-3


def test_an_edge_that_is_no_better_than_its_neighbour_is_not_extended() -> None:
    candidates, chosen = choose(BASE, scored(lambda each: 0.5))
    assert tried(candidates) == [(1e-3, 3), (3e-3, 3), (1e-2, 3), (3e-3, 9), (3e-3, 20)]
    assert (chosen.recipe.lr, chosen.recipe.epochs) == (3e-3, 3)


def test_training_that_shows_late_is_found_although_no_rate_shows_early() -> None:
    # every rate still has the probe's score at first, as on few samples
    _, chosen = choose(BASE, scored(lambda each: 0.9 if each.recipe.epochs == 20 else 0.5))
    assert (chosen.recipe.lr, chosen.recipe.epochs) == (3e-3, 20)


def test_more_epochs_are_tried_while_they_help() -> None:
    for best, expected in ((3, [9]), (9, [9, 20]), (20, [9, 20])):
        candidates, chosen = choose(
            BASE, scored(lambda each, best=best: -abs(each.recipe.lr - 3e-3) - abs(each.recipe.epochs - best))
        )
        assert chosen.recipe.epochs == best
        assert tried(candidates)[3:] == [(3e-3, epochs) for epochs in expected]


def test_a_variant_is_taken_if_it_is_better() -> None:
    bottleneck = fair_contender("bottleneck m=8", "image")
    for wanted in ("gelu", None):
        _, chosen = choose(bottleneck, scored(lambda each, wanted=wanted: float(each.method.activation == wanted)))
        assert chosen.method.activation == wanted
        assert chosen.name == "bottleneck m=8"
        assert chosen.setting() == bottleneck.setting()
    assert fair_contender("bottleneck m=8 activation=gelu", "image").variants == ()


def test_nothing_is_chosen_before_all_results_are_there() -> None:
    candidates, chosen = choose(BASE, lambda each: None)
    assert tried(candidates) == [(rate, 3) for rate in BASE.rates]
    assert chosen is None
    single = dataclasses.replace(BASE, rates=(), lengths=())
    assert choose(single, lambda each: None) == ([], single)


@pytest.mark.parametrize(
    ("rate", "up", "down"), [(1e-3, 3e-3, 3e-4), (3e-3, 1e-2, 1e-3), (2e-3, 1e-2, 1e-3), (0.1, 0.3, 3e-2)]
)
def test_rates_continue_the_series(rate: float, up: float, down: float) -> None:
    assert (next_rate(rate, True), next_rate(rate, False)) == (up, down)


def test_lengths_must_increase() -> None:
    with pytest.raises(VisadaptError, match=r"lengths must be numbers of epochs in increasing order, got \(9, 3\)"):
        dataclasses.replace(BASE, lengths=(9, 3))


def test_what_is_not_chosen_is_the_same_for_all_of_a_comparison() -> None:
    problems = (small(), problem("bundled/minilm", "tweets"))
    plans = [plan for each in problems for plan in comparisons([each], (), (0, 1), LENGTHS[each.modality], fast=True)]
    for plan in plans:
        assert [each.name for each in plan.contenders] == list(COMPARED)
        assert len({each.recipe.batch_size for each in plan.contenders}) == 1
        trained = [each for each in plan.contenders if each.name != "linear probe"]
        assert {each.lengths for each in trained} == {LENGTHS[plan.problems[0].modality]}
        assert all(each.recipe.fast for each in trained)
        for each in plan.contenders:
            assert each.validated
            assert each.extend
            assert each.recipe.head_first
            assert 16 <= each.recipe.batch_size <= 32
    full = next(line for line in costs(plans[1].contenders, 2) if line.startswith("full"))
    assert full == (
        "full fine-tuning: per problem 4 to 9 training runs to choose by, then 2; epochs 3, 9, 20; batches of 16; bf16 "
        "autocast"
    )


def test_no_task_ends_below_its_own_probe_on_validation_data(tmp_path) -> None:
    # at such a rate training only does harm
    wild = dataclasses.replace(
        fair_contender("bottleneck m=4 activation=relu", "image", (1,)), rates=(1.0,), lengths=()
    ).with_recipe(lr=1.0)
    probe = dataclasses.replace(fair_contender("linear probe", "image"), rates=(1e-7,), extend=False).with_recipe(
        lr=1e-7, epochs=1
    )
    results = run_experiment(
        Compare((small(),), (probe, wild), (0,), "both"), tmp_path, say=lambda line: None, regime="tiny"
    )
    scores = {(r.contender, r.split): r.score for r in results}
    assert scores["bottleneck m=4 activation=relu", "validation"] == scores["linear probe", "validation"] > 0.3
    assert {r.regime for r in results} == {"tiny"}
    assert {(r.contender, r.is_probe) for r in results} == {("linear probe", False), (wild.name, True)}
    assert untrained(results) == [wild.name]
    assert (
        str(paired_tables(results)[0])
        .splitlines()[0]
        .endswith(f"no epoch of {wild.name} was better on validation data than the linear probe at its start")
    )


def test_a_fair_comparison_is_chosen_run_and_reported(tmp_path) -> None:
    names = ("linear probe", "bottleneck m=2", "full fine-tuning")
    (plan,) = comparisons((small(augment="shift"),), names, (0, 1), (1, 2), fast=False)
    results = run_experiment(plan, tmp_path, say=lambda line: None)
    assert len([r for r in results if r.split == "test"]) == 6
    # of the first seed of an adapter the file of a trial is loaded, of the others the task is in memory
    assert {r.contender for r in results if isinstance(r.facts.get("kept"), int)} == set(names[1:])
    assert not any("kept" not in r.facts for r in results if r.contender != names[0])
    (table,) = paired_tables(results)
    assert [row[0] for row in table.rows] == list(names)
    assert [row[-1] for row in table.rows][-1] == "the reference"
    assert table.rows[1][-2] == "2"
    assert build(results).sections
    assert "epochs" in str(sweep_table(results))
    again: list[str] = []
    assert run_experiment(plan, tmp_path, say=again.append) == results
    assert again == []


def test_both_splits_are_measured_after_one_training_run(problem, workspace) -> None:
    plan = Compare((problem,), (dataclasses.replace(BASE, rates=(), lengths=()),), (0,), "both")
    (run,) = plan.runs(lambda key: None)
    assert len(run.keys) == 2
    alone = TrainingRun("compare", problem, plan.contenders[0], 0, "test")
    assert run.keys[1] == alone.key


def test_after_the_deadline_no_run_begins(tmp_path) -> None:
    plan = Compare((small(),), (dataclasses.replace(BASE, rates=(), lengths=()),), (0,))
    assert run_experiment(plan, tmp_path, deadline=0.0) == []


def test_results_of_another_regime_are_not_used(problem, tmp_path) -> None:
    plan = Compare((problem,), (fair_contender("linear probe", "image"),), (0,))
    plan = dataclasses.replace(plan, contenders=(dataclasses.replace(plan.contenders[0], rates=(), extend=False),))
    lines: list[str] = []
    for regime in ("a", "b", "b"):
        run_experiment(plan, tmp_path, regime=regime, say=lines.append)
    assert len(lines) == 2


def test_images_are_shifted_and_only_mirrored_if_that_is_wanted() -> None:
    plain, shifted, mirrored = small(), small(augment="shift"), small(augment="shift and mirror")
    assert plain.augmentation() is None
    assert [each.augmentation().keywords["flip"] for each in (shifted, mirrored)] == [False, True]
    assert shifted.augmentation().keywords["crop_padding"] == 1
    assert "augment" not in plain.described()
    with pytest.raises(VisadaptError, match="no augmentation 'shifts'; did you mean 'shift'"):
        small(augment="shifts")


def test_a_fifth_of_few_images_is_held_out() -> None:
    splits = small(validation=None, train=None).splits
    assert len(splits.validation.labels) == 1437 // 5
    assert len(splits.train.labels) == 1437 - 1437 // 5


def test_few_samples_are_trained_for_more_epochs() -> None:
    assert lengths_of(small(train=1280)) == LENGTHS["image"]
    few = small(train=64)
    assert lengths_of(few) == (50, 90, 200)
    plans = comparisons((few, small(train=1280), small(train=65)), COMPARED[1:], (0,), (), fast=False)
    assert [[each.train for each in plan.problems] for plan in plans] == [[64], [1280], [65]]
    assert plans[2].contenders[0].lengths == (35, 63, 140)
    (given,) = comparisons((few, small(train=1280)), COMPARED[1:], (0,), (2,), fast=False)
    assert given.contenders[0].lengths == (2,)


def test_the_expected_duration_is_that_of_what_is_trained(tmp_path) -> None:
    (plan,) = comparisons((small(),), COMPARED[2:], (0, 1), (1, 2), fast=False)
    least, most = forecast([plan], "cpu")
    assert 0 < least < most
    assert not finished([plan], tmp_path)
    probe = dataclasses.replace(fair_contender("linear probe", "image"), rates=())
    probes = dataclasses.replace(plan, contenders=(probe,))
    assert forecast([probes], "cpu") == (0, 0)
    run_experiment(probes, tmp_path, say=lambda line: None)
    assert finished([probes], tmp_path)
    assert [readable(s) for s in (0, 40, 100, 1500, 12600)] == ["1 s", "40 s", "1.7 min", "25 min", "3.5 h"]


def test_a_bottleneck_trains_the_same_fraction_of_every_backbone() -> None:
    wide = small(options=(("pretrained", False), ("channels", (16, 32, 48, 64))))
    plan = matched((small(), wide), "bottleneck m=4 activation=relu", (0,), (1, 2), fast=False)
    names = [[each.name for each in group] for group in plan.contenders]
    assert [group[:2] for group in names] == [["full fine-tuning", "linear probe"]] * 2
    assert names[0][2] == "bottleneck m=4 activation=relu"
    shares = [trained_fraction(each, group[2]) for each, group in by_problem(plan)]
    nearest = abs(shares[1] - shares[0])
    wider = dataclasses.replace(plan.contenders[1][2], method=Bottleneck(plan.contenders[1][2].method.m + 1))
    assert nearest < abs(trained_fraction(wide, wider) - shares[0])
    assert {each.lengths for _, group in by_problem(plan) for each in group if each.name != "linear probe"} == {(1, 2)}
    for wrong in ("lora r=8", "bottleneck m=0.5"):
        with pytest.raises(VisadaptError, match="must be a bottleneck such as 'bottleneck m=8', got"):
            matched((small(),), wrong, (0,), (), fast=False)
