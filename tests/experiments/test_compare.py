"""Comparisons on a small real problem: what they measure, what they reuse, and that they do not use test data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import visadapt
from tests.experiments.conftest import CONTENDERS, make_contender, small
from visadapt import VisadaptError
from visadapt.experiments import (
    Compare,
    Contender,
    ImageProblem,
    Result,
    linear_probe,
    read_results,
    run_experiment,
)
from visadapt.experiments.linear_probe import fit_head, is_probe
from visadapt.experiments.record import write
from visadapt.experiments.run import TrainingRun
from visadapt.experiments.train import Workspace
from visadapt.methods import Bottleneck, Linear
from visadapt.report import sweep_table, table
from visadapt.training import Diverged, Recipe, evaluate, fit
from visadapt.training.head_first import Unsuited


def run(experiment: Compare, folder: Path) -> tuple[list[Result], int]:
    """Return the results, and how many of them were computed now."""
    lines: list[str] = []
    return run_experiment(experiment, folder, say=lines.append), len(lines)


def test_each_contender_trains_what_its_name_says(problem: ImageProblem, workspace: Workspace) -> None:
    backbone = problem.fresh()
    norms = sum(p.numel() for n, p in backbone.named_parameters() if "bn" in n or "downsample.1" in n)
    whole = sum(p.numel() for n, p in backbone.named_parameters() if not n.startswith("fc."))
    adapters = sum(2 * 4 * c + c + 4 for c in (8, 8, 16, 16, 24, 24, 32, 32))
    for contender, expected in zip(CONTENDERS, (0, norms, norms + adapters, whole), strict=True):
        training = TrainingRun("compare", problem, contender, 0, keep=True)
        (result,) = training.results(training.keys, workspace)
        assert result.trained == expected, contender.name
        assert result.backbone == whole
        assert result.head == 32 * 10 + 10
        assert result.bytes > 4 * (result.trained + result.head)
        assert result.fraction == expected / whole
        assert (result.network, result.problem, result.modality) == ("resnet18", "digits", "image")
        assert torch.__version__.startswith(result.machine["torch"])
        model, _ = training.trained(workspace)
        expected_score = evaluate(model, "digits", problem.splits.test, ("accuracy",), prepare=problem.prepare)
        assert result.score == expected_score["accuracy"]
        assert is_probe(model, "digits") is (contender.name == "linear probe")


def test_finished_results_are_not_computed_again(problem: ImageProblem, tmp_path: Path) -> None:
    first, computed = run(Compare((problem,), CONTENDERS[:2], (0,)), tmp_path)
    assert computed == 2
    assert read_results(tmp_path) == first
    more, computed = run(Compare((problem,), CONTENDERS[:3], (0, 1)), tmp_path)
    assert computed == 4, "two of six existed"
    assert set(map(str, first)) <= set(map(str, more))
    _, computed = run(Compare((small(train=63),), CONTENDERS[:1], (0,)), tmp_path)
    assert computed == 1, "another subset is another result"
    file = next((tmp_path / "compare").glob("*.json"))
    file.unlink()
    _, computed = run(Compare((problem,), CONTENDERS[:3], (0, 1)), tmp_path)
    assert computed <= 1, "only a missing result is computed again"


def test_another_experiment_reuses_results(problem: ImageProblem, tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Other(Compare):
        name = "other"

    (first,), _ = run(Compare((problem,), CONTENDERS[:1], (0,)), tmp_path)
    renamed = dataclasses.replace(CONTENDERS[0], name="the same by another name")
    (taken,), computed = run(Other((problem,), (renamed,), (0,)), tmp_path)
    assert computed == 0
    assert taken == dataclasses.replace(first, experiment="other", contender=renamed.name)
    assert (tmp_path / "other" / f"{first.key}.json").is_file()


def test_runs_that_depend_on_reused_results_are_executed(problem: ImageProblem, tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Other(Compare):
        name = "other"

    probe = dataclasses.replace(make_contender(Linear(), "linear probe"), rates=(1e-5, 1e-1))
    run(Compare((problem,), (probe,), (0,), "validation"), tmp_path)
    results, computed = run(Other((problem,), (probe,), (0,)), tmp_path)
    assert computed == 1
    assert [r.split for r in results] == ["validation", "validation", "test"]


def test_a_setting_identifies_problem_and_contender(problem: ImageProblem, tmp_path: Path) -> None:
    def setting(on: ImageProblem = problem, seed: int = 0, split: str = "test", **recipe: Any) -> str:
        return TrainingRun("compare", on, make_contender(**recipe), seed, split).setting

    assert setting() == setting(seed=1) == setting(split="validation") == setting(lr=3e-3)
    assert len({setting(), setting(small(train=63)), setting(small(size=32)), setting(epochs=2)}) == 4
    (result,), _ = run(Compare((problem,), CONTENDERS[:1], (0,)), tmp_path)
    assert result.setting == TrainingRun("compare", problem, CONTENDERS[0], 0).setting


def test_a_reused_result_gets_its_setting(problem: ImageProblem, tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Other(Compare):
        name = "other"

    (first,), _ = run(Compare((problem,), CONTENDERS[:1], (0,)), tmp_path)
    write(dataclasses.replace(first, setting=None), tmp_path)
    (taken,), computed = run(Other((problem,), CONTENDERS[:1], (0,)), tmp_path)
    assert (computed, taken.setting) == (0, first.setting)


def test_the_table_has_mean_and_standard_deviation_over_seeds() -> None:
    results = [a_result(contender="a", seed=s, score=a) for s, a in enumerate((0.5, 0.6, 0.7))]
    shown = table(results)
    assert list(shown.rows[0]) == ["a", "60.0 ± 10.0", "30", "3.00 %", "5", "2", "4.00 MB"]
    assert "±" not in str(table(results[:1]))


def test_learning_rates_are_chosen_on_validation_data(problem: ImageProblem, tmp_path: Path) -> None:
    probe = dataclasses.replace(make_contender(Linear(), "linear probe", epochs=20), rates=(1e-5, 1e-1))
    results, computed = run(Compare((problem,), (probe,), (0, 1)), tmp_path)
    assert computed == 4
    assert [(r.split, r.lr, r.seed) for r in results] == [
        ("validation", 1e-5, 0),
        ("validation", 1e-1, 0),
        ("test", 1e-1, 0),
        ("test", 1e-1, 1),
    ]
    swept, computed = run(Compare((problem,), (probe,), (0,), "validation"), tmp_path)
    assert computed == 0, "a sweep alone is the first half of a comparison"
    shown = sweep_table(swept)
    assert shown.rows[0][-1] == "0.1"
    assert str(shown).count("*") == 1


WILD = {"grad_clip": None, "warmup": 0.0, "batch_size": 16}
"""Options with which training diverges at a rate of 1e30."""


def test_a_trial_that_diverges_is_not_chosen(problem: ImageProblem, tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Other(Compare):
        name = "other"

    adapters = dataclasses.replace(make_contender(**WILD), rates=(1e30, 1e-3))
    results, computed = run(Compare((problem,), (adapters,), (0,)), tmp_path)
    assert computed == 3
    assert [(r.split, r.lr, "stopped" in r.facts) for r in results] == [
        ("validation", 1e30, True),
        ("validation", 1e-3, False),
        ("test", 1e-3, False),
    ]
    assert "1e+30: diverged" in str(sweep_table(results))
    again, computed = run(Other((problem,), (adapters,), (0,)), tmp_path)
    assert computed == 0, "it is not tried again, here or in another experiment"
    assert [r.lr for r in again] == [1e30, 1e-3, 1e-3]
    assert again[0].diverged


def test_if_all_trials_diverge_the_error_names_the_run(problem: ImageProblem, tmp_path: Path) -> None:
    adapters = dataclasses.replace(make_contender(name="wild", **WILD), rates=(1e30, 1e31))
    with pytest.raises(Diverged, match=r"wild on resnet18, digits, seed 0: the \w+ became \w+ at step"):
        run(Compare((problem,), (adapters,), (0,)), tmp_path)
    assert len(read_results(tmp_path)) == 2


def test_the_kept_task_of_the_best_trial_is_reused_as_a_final_run(
    problem: ImageProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    monkeypatch.setattr("visadapt.experiments.train.fit", lambda *args, **options: trained.append(options["seed"]))
    adapters = dataclasses.replace(make_contender(), rates=(1e-3, 1e-2, 1e-1))
    for split in ("validation", "test"):
        run(Compare((problem,), (adapters,), (0, 1), split, keep=(adapters.name,)), tmp_path)
    assert trained == [0, 0, 0, 1], "three rates, and another seed at one of them"


def folder_of_digits(parent: Path, other: bool) -> str:
    """Write an ImageFolder of digits, with wrong test labels if ``other``."""
    splits = small("digits").splits
    for name, samples in (("train", splits.train), ("test", splits.test)):
        for number, (image, label) in enumerate(zip(samples.inputs, samples.labels, strict=True)):
            digit = (int(label) + (other and name == "test")) % 10
            folder = parent / "same" / name / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:03}.png")
    return str(parent / "same")


def test_a_sweep_does_not_depend_on_test_data(tmp_path: Path) -> None:
    probe = dataclasses.replace(make_contender(Linear(), "linear probe", epochs=20), rates=(1e-3, 1e-2, 1e-1))
    results = []
    for other in (False, True):
        data = folder_of_digits(tmp_path / str(other), other)
        digits = small(data, train=None, validation=30, test=None)
        assert digits.name == "same"
        results.append(run(Compare((digits,), (probe,), (0,)), tmp_path / f"results-{other}")[0])
    first, second = ([(r.split, r.lr, r.score) for r in group] for group in results)
    assert first[:-1] == second[:-1], "validation scores"
    assert first[-1][:2] == second[-1][:2], "the chosen rate"
    assert first[-1][2] != second[-1][2], "only the test score differs"
    assert {r.key for r in results[0]}.isdisjoint(r.key for r in results[1]), "other data gives other keys"


def test_training_on_cached_features_equals_training_on_images(problem: ImageProblem) -> None:
    recipe = Recipe(epochs=3, lr=1e-2, head_first=False)
    models = [CONTENDERS[0].put(problem, 0) for _ in range(2)]
    data = problem.splits.train
    fit_head(models[0], "digits", data, recipe, prepare=problem.prepare, seed=4)
    fit(models[1], "digits", data, recipe=recipe, prepare=problem.prepare, seed=4)
    cached, plain = (dict(visadapt.named_parameters(model, "digits")) for model in models)
    for name, parameter in cached.items():
        assert torch.allclose(parameter, plain[name], atol=1e-5), name
    with pytest.raises(VisadaptError, match="task 'digits' is not a linear probe"):
        fit_head(CONTENDERS[1].put(problem, 0), "digits", data, recipe)


def test_a_probe_without_a_solution_starts_at_random(problem: ImageProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> float:
        raise Unsuited("the loss is not finite")

    monkeypatch.setattr(linear_probe, "fit_linear", none)
    model, data = CONTENDERS[0].put(problem, 0), problem.splits
    recipe = Recipe(epochs=2, lr=1e-2)
    history = fit_head(model, "digits", data.train, recipe, validation=data.validation, prepare=problem.prepare)
    assert history.score is not None


def test_training_on_a_cached_prefix_equals_training_on_images(problem: ImageProblem, workspace: Workspace) -> None:
    late = dataclasses.replace(make_contender(epochs=2), norms="frozen", where=range(6, 8))
    kept, _ = TrainingRun("compare", problem, late, 0).trained(workspace)
    plain = late.put(problem, 0)
    fit(plain, "digits", problem.splits.train, recipe=late.recipe, prepare=problem.prepare, seed=0)
    cached = dict(visadapt.named_parameters(kept, "digits"))
    for name, parameter in visadapt.named_parameters(plain, "digits"):
        assert torch.allclose(parameter, cached[name], atol=1e-5), name


def test_a_seed_determines_the_initial_parameters(problem: ImageProblem) -> None:
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    contender = Contender("b", Bottleneck(4), Recipe())
    a, b, c = (contender.put(problem, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected), "the global random state has changed"
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def a_result(**changes: Any) -> Result:
    common: dict[str, Any] = {"experiment": "compare", "modality": "image", "network": "n", "problem": "p"}
    common |= {"contender": "c", "seed": 0, "split": "test", "metric": "accuracy", "score": 0.5, "trained": 30}
    common |= {"head": 5, "backbone": 1000, "seconds": 2.0, "bytes": 4_000_000, "lr": 1e-3, "epochs": 3}
    fields = {**common, **changes}
    return Result(key=f"{fields['contender']}{fields['seed']}", **fields)
