"""Each experiment on small problems: its results, their coordinates, and what they measure."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.experiments.conftest import CONTENDERS, make_contender, perturbed, small
from visadapt import VisadaptError
from visadapt.experiments import (
    Ablation,
    Decathlon,
    Experiment,
    InitScale,
    Modality,
    Result,
    Sequence,
    Tradeoff,
    Transfer,
    contender,
    problem,
    run_experiment,
)
from visadapt.experiments.decathlon import score
from visadapt.experiments.run import TrainingRun
from visadapt.experiments.train import Workspace, measure
from visadapt.experiments.transplant import body_tensors, without_layers
from visadapt.methods import Bottleneck, Full
from visadapt.runtime.registry import named_tensors, registry_of
from visadapt.task_file import read, save
from visadapt.training import Diverged

ADAPTER, FULL = make_contender(Bottleneck(4), "bottleneck m=4"), make_contender(Full(), "full fine-tuning")


def run(experiment: Experiment, folder: Path) -> list[Result]:
    """Run an experiment twice, and return its results; the second run computes nothing."""
    results = run_experiment(experiment, folder, say=lambda _: None)
    lines: list[str] = []
    assert run_experiment(experiment, folder, say=lines.append) == results
    assert lines == []
    assert {r.experiment for r in results} == {experiment.name}
    return results


def facts(results: list[Result]) -> list[dict[str, Any]]:
    return [r.facts for r in results]


def test_tradeoff_has_every_width_and_number_of_layers(tmp_path: Path) -> None:
    settled = ("bottleneck", "norms only", "full fine-tuning")
    all_results = run(Tradeoff((small(),), (1, 8), (1, 2), (0,), epochs=1, settled=settled), tmp_path)
    results = [r for r in all_results if r.split == "test"]
    trials = [r for r in all_results if r.split == "validation"]
    assert {(r.contender, r.lr) for r in trials} == {
        (f"top layers n={n}", rate) for n in (1, 2) for rate in contender("top layers n=1").rates
    }
    assert facts(results) == [{"m": 1}, {"m": 8}, {"n": 1}, {"n": 2}, {}, {}]
    assert [r.contender for r in results[-2:]] == ["norms only", "full fine-tuning"]
    trained = [r.trained for r in results]
    assert trained[0] < trained[1]
    assert trained[2] < trained[3] < trained[5] == results[0].backbone
    assert Tradeoff((small(),)).widths == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def test_init_scale_initialises_with_each_standard_deviation(tmp_path: Path) -> None:
    results = run(InitScale((small(),), ADAPTER, (1e-7, 1e-2), (0,)), tmp_path)
    assert facts(results) == [{"std": 1e-7}, {"std": 1e-2}]
    assert {r.split for r in results} == {"validation"}
    model = InitScale((small(),), ADAPTER, (1e-2,), (0,)).runs(lambda key: None)[0].contender.put(small(), 0)
    ups = [t for key, t in named_tensors(registry_of(model), "digits").items() if key.endswith("up.weight")]
    assert all(0 < t.abs().max() <= 2e-2 for t in ups)
    with pytest.raises(VisadaptError, match="the method of init_scale's contender must be a Bottleneck, got Full"):
        InitScale((small(),), FULL)


def test_a_training_run_that_diverges_is_a_result_too(tmp_path: Path) -> None:
    wild = make_contender(Bottleneck(4), "wild", lr=1e30, grad_clip=None, warmup=0.0, epochs=3)
    experiment = InitScale((small(),), wild, (10.0,), (0,))
    (result,) = run(experiment, tmp_path)
    assert "became" in result.facts["stopped"]
    (trial,) = experiment.runs(lambda key: None)
    untrained = trial.contender.put(small(), 0)
    assert result.score == measure(untrained, "digits", small(), "validation", Workspace(tmp_path))
    assert result.seconds == 0


def test_any_other_error_is_raised(tmp_path: Path) -> None:
    experiment = InitScale((small(),), ADAPTER, (1e-2,), (0,))
    (trial,) = experiment.runs(lambda key: None)
    Workspace(tmp_path).task_file(trial.task_key).write_bytes(b"half a task")
    with pytest.raises(VisadaptError, match=trial.task_key):
        run(experiment, tmp_path)


def test_initial_weights_without_finite_outputs_are_a_result_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> float:
        raise Diverged("task 'digits' gives NaN")

    monkeypatch.setattr("visadapt.experiments.run.measure", fails)
    (result,) = run(InitScale((small(),), ADAPTER, (10.0,), (0,)), tmp_path)
    assert (result.score, result.facts["stopped"]) == (0, "task 'digits' gives NaN")


def test_ablation_removes_every_span_without_training_again(tmp_path: Path) -> None:
    problem = small(validation=20)
    results = run(Ablation((problem,), (ADAPTER,)), tmp_path)
    spans = [(f["first"], f["last"]) for f in facts(results) if f["norms"] == "kept"]
    assert spans == [(None, None), *((i, j) for i in range(8) for j in range(i, 8))]
    assert len(results) == 2 * len(spans)
    assert len(list((tmp_path / "tasks").glob("*.visadapt"))) == 1, "one training run for all"
    assert len(Ablation((problem,), (ADAPTER,)).runs(lambda key: None)) == 1, "no other process trains the task again"
    assert {f["layers"] for f in facts(results)} == {8}
    labels = problem.splits.validation.labels
    assert labels is not None
    assert {r.facts["majority"] for r in results} == {labels.bincount().max().item() / 20}
    assert results[0].score == results[len(spans)].score


def test_an_ablation_measures_the_task_without_the_removed_parts(tmp_path: Path) -> None:
    problem, workspace = small(), Workspace(tmp_path)
    experiment = Ablation((problem,), (ADAPTER,), norms=("reverted",))
    training = experiment.runs(lambda key: None)[0].training  # type: ignore[attr-defined]
    # stands for the task file of a long training run
    model = perturbed(ADAPTER.put(problem, 0), "digits")
    save(model, "digits", workspace.task_file(training.task_key), notes={"seconds": 1.0})
    results = run_experiment(experiment, tmp_path, say=lambda _: None)
    assert len({r.score for r in results}) > 3
    for result in results[1::7]:
        removed = range(result.facts["first"], result.facts["last"] + 1)
        with without_layers(model, "digits", removed, norms=True):
            assert measure(model, "digits", problem, "validation", workspace) == result.score


def test_transfer_starts_from_the_source_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = (small("digits"), small("mnist"), small("fashion-mnist"))
    experiment = Transfer(problems, ADAPTER, (0,))
    results = run(experiment, tmp_path)
    pairs = [(r.problem, r.facts["source"]) for r in results]
    names = [p.name for p in problems]
    assert pairs[:3] == [(name, None) for name in names]
    assert set(pairs[3:]) == {(a, b) for a in names for b in names if a != b}
    training = next(training for training in experiment.runs(lambda key: results[0]) if training.start is not None)
    assert training.start is not None
    initial: dict[str, torch.Tensor] = {}

    def train(model: torch.nn.Module, *_: Any) -> float:
        initial.update({key: tensor.clone() for key, tensor in body_tensors(model, training.problem.name).items()})
        return 0.0

    monkeypatch.setattr("visadapt.experiments.run.train", train)
    training.trained(Workspace(tmp_path))
    source = read(Workspace(tmp_path).task_file(training.start.task_key)).tensors
    assert initial
    assert all(torch.equal(value, source[key]) for key, value in initial.items())


def test_a_sequence_of_tasks_forgets_nothing_and_fine_tuning_does(tmp_path: Path) -> None:
    problems = (small("digits"), small("mnist"), small("fashion-mnist"))
    results = run(Sequence(problems, (ADAPTER,), FULL), tmp_path)
    own, shared = ([r for r in results if r.contender == name] for name in (ADAPTER.name, "sequential fine-tuning"))
    names = [p.name for p in problems]
    for chain in (own, shared):
        measured = [(r.facts["position"], r.facts["after"], r.problem) for r in chain]
        assert measured == [(k, names[k], names[i]) for k in range(3) for i in range(k + 1)]
    for name in names:
        assert len({r.facts["outputs"] for r in own if r.problem == name}) == 1, "bit-identical outputs"
        assert len({r.score for r in own if r.problem == name}) == 1
    for k, name in enumerate(names):
        assert len({r.facts["outputs"] for r in shared if r.problem == name}) == 3 - k, "each new task changes all"
    task_size = own[0].trained + own[0].head
    assert own[-1].facts["total"] == pytest.approx(1 + 3 * task_size / own[0].backbone)
    assert shared[-1].facts["total"] == pytest.approx(1 + 3 * own[0].head / own[0].backbone)


def test_a_task_of_a_sequence_equals_the_task_trained_alone(tmp_path: Path) -> None:
    problems = (small("digits"), small("mnist"))
    results = run(Sequence(problems, (ADAPTER,)), tmp_path)
    (alone,) = TrainingRun("compare", problems[1], ADAPTER, 0).results(("",), Workspace(tmp_path))
    assert results[-1].problem == "mnist"
    assert results[-1].score == alone.score


def test_an_impossible_sequence_is_refused() -> None:
    with pytest.raises(VisadaptError, match="the problems of a sequence must have one network"):
        Sequence((small("digits"), small("mnist", options=())), (ADAPTER,))
    with pytest.raises(VisadaptError, match=r"must have different names, got \['digits', 'digits'\]"):
        Sequence((small("digits"), small("digits", train=8)), (ADAPTER,))
    with pytest.raises(VisadaptError, match="the method of sequential fine-tuning must be Full, got Bottleneck"):
        Sequence((small("digits"),), (ADAPTER,), ADAPTER)


def test_modality_puts_adapters_at_both_ends(tmp_path: Path) -> None:
    results = run(Modality((small(),), (FULL,), ADAPTER, (0,)), tmp_path)
    places = ["first 1", "last 1", "first 2", "last 2", "first 4", "last 4", "all"]
    assert [r.facts.get("where") for r in results] == [None, *places]
    assert {r.facts["layers"] for r in results[1:]} == {8}
    widths = [8, 8, 16, 16, 24, 24, 32, 32]
    ends = {"first 2": widths[:2], "last 2": widths[-2:], "all": widths}
    for place, channels in ends.items():
        (result,) = (r for r in results if r.facts.get("where") == place)
        assert result.trained == sum(2 * 4 * c + c + 4 for c in channels), "no norms, nothing elsewhere"


def test_half_of_the_depth_is_among_the_places() -> None:
    tweets = problem("bundled/minilm", "tweets", train=8, validation=8, test=8)
    runs = Modality((tweets,), (), ADAPTER, (0,)).runs(lambda key: None)
    places = [f"{end} {k}" for k in (1, 2, 3, 4) for end in ("first", "last")]
    assert [training.facts["where"] for training in runs] == [*places, "all"]


def test_decathlon_scores_its_own_runs(tmp_path: Path) -> None:
    problems = (small("digits"), small("mnist"))
    results = run(Decathlon(problems, CONTENDERS[:1], FULL, (0, 1)), tmp_path)
    scores = [r for r in results if r.metric == "decathlon"]
    assert [(r.contender, r.seed) for r in scores] == [
        (name, seed) for name in (FULL.name, "linear probe") for seed in (0, 1)
    ]
    assert len(results) == 2 * 2 * 2 + len(scores)

    def accuracies(name: str, seed: int) -> dict[str, float]:
        own = [r for r in results if r.contender == name and r.seed == seed and r.metric == "accuracy"]
        return {r.problem: 100 * r.score for r in own}

    full = [accuracies(FULL.name, seed) for seed in (0, 1)]
    baselines = {name: (full[0][name] + full[1][name]) / 2 for name in full[0]}
    for result in scores:
        assert result.score == pytest.approx(score(accuracies(result.contender, result.seed), baselines))
        assert result.facts["problems"] == ["digits", "mnist"]
        assert (result.facts["seeds"], result.setting) == (2, None)
    (linear,) = (r for r in scores if r.contender == "linear probe" and r.seed == 0)
    assert linear.facts["total"] == pytest.approx(1 + 2 * 330 / linear.backbone)


def test_another_baseline_gives_another_score(tmp_path: Path) -> None:
    problems = (small("digits"),)
    first = run(Decathlon(problems, (), FULL, (0,)), tmp_path)
    longer = dataclasses.replace(FULL.with_recipe(epochs=2), name="longer")
    second = run(Decathlon(problems, (), longer, (0,)), tmp_path)
    assert first[-1].key != second[-1].key
