"""Each experiment, run as it is on small problems: its results, their coordinates, and that they mean what they say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.experiments.conftest import EVERYONE, small, stirred, who
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
from visadapt.experiments.run import Training
from visadapt.experiments.train import Workplace, measure
from visadapt.experiments.transplant import body, without
from visadapt.methods import Bottleneck, Full
from visadapt.runtime.registry import named_tensors, registry_of
from visadapt.task_file import read, save
from visadapt.training import Diverged

ADAPTER, FULL = who(Bottleneck(4), "bottleneck m=4"), who(Full(), "full fine-tuning")


def made(experiment: Experiment, folder: Path) -> list[Result]:
    """Its results; asked for again, they are there."""
    results = run_experiment(experiment, folder, say=lambda _: None)
    again: list[str] = []
    assert run_experiment(experiment, folder, say=again.append) == results
    assert again == []
    assert {r.experiment for r in results} == {experiment.name}
    return results


def facts(results: list[Result]) -> list[dict[str, Any]]:
    return [r.facts for r in results]


def test_tradeoff_has_every_width_and_number_of_layers(tmp_path: Path) -> None:
    settled = ("bottleneck", "norms only", "full fine-tuning")
    wanted = Tradeoff((small(),), (1, 8), (1, 2), (0,), epochs=1, settled=settled)
    every = made(wanted, tmp_path)
    results = [r for r in every if r.split == "test"]
    tried = [r for r in every if r.split == "validation"]
    assert {(r.contender, r.lr) for r in tried} == {
        (f"top layers n={n}", rate) for n in (1, 2) for rate in contender("top layers n=1").rates
    }
    assert facts(results) == [{"m": 1}, {"m": 8}, {"n": 1}, {"n": 2}, {}, {}]
    assert [r.contender for r in results[-2:]] == ["norms only", "full fine-tuning"]
    trained = [r.trained for r in results]
    assert trained[0] < trained[1]
    assert trained[2] < trained[3] < trained[5] == results[0].backbone
    assert Tradeoff((small(),)).widths == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def test_init_scale_draws_at_each_scale(tmp_path: Path) -> None:
    results = made(InitScale((small(),), ADAPTER, (1e-7, 1e-2), (0,)), tmp_path)
    assert facts(results) == [{"std": 1e-7}, {"std": 1e-2}]
    assert {r.split for r in results} == {"validation"}
    drawn = InitScale((small(),), ADAPTER, (1e-2,), (0,)).runs(lambda key: None)[0].contender.put(small(), 0)
    ups = [t for key, t in named_tensors(registry_of(drawn), "digits").items() if key.endswith("up.weight")]
    assert all(0 < t.abs().max() <= 2e-2 for t in ups)
    with pytest.raises(VisadaptError, match="init_scale needs a bottleneck"):
        InitScale((small(),), FULL)


def test_a_training_that_ends_in_infinity_is_a_result_too(tmp_path: Path) -> None:
    wild = who(Bottleneck(4), "wild", lr=1e30, grad_clip=None, warmup=0.0, epochs=3)
    asked = InitScale((small(),), wild, (10.0,), (0,))
    (result,) = made(asked, tmp_path)
    assert "became" in result.facts["stopped"]
    (run,) = asked.runs(lambda key: None)
    untrained = run.contender.put(small(), 0)
    assert result.score == measure(untrained, "digits", small(), "validation", Workplace(tmp_path))
    assert result.seconds == 0


def test_another_error_is_no_result(tmp_path: Path) -> None:
    asked = InitScale((small(),), ADAPTER, (1e-2,), (0,))
    (run,) = asked.runs(lambda key: None)
    Workplace(tmp_path).task_file(run.task_key).write_bytes(b"half a task")
    with pytest.raises(VisadaptError, match=run.task_key):
        made(asked, tmp_path)


def test_first_weights_that_give_no_numbers_are_a_result_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> float:
        raise Diverged("task 'digits' gives NaN")

    monkeypatch.setattr("visadapt.experiments.run.measure", fails)
    (result,) = made(InitScale((small(),), ADAPTER, (10.0,), (0,)), tmp_path)
    assert (result.score, result.facts["stopped"]) == (0, "task 'digits' gives NaN")


def test_ablation_takes_out_every_span_without_training_again(tmp_path: Path) -> None:
    problem = small(validation=20)
    results = made(Ablation((problem,), (ADAPTER,)), tmp_path)
    spans = [(f["first"], f["last"]) for f in facts(results) if f["norms"] == "kept"]
    assert spans == [(None, None), *((i, j) for i in range(8) for j in range(i, 8))]
    assert len(results) == 2 * len(spans)
    assert len(list((tmp_path / "tasks").glob("*.visadapt"))) == 1, "one training for all"
    assert len(Ablation((problem,), (ADAPTER,)).runs(lambda key: None)) == 1, "nobody beside it trains the task again"
    assert {f["layers"] for f in facts(results)} == {8}
    labels = problem.splits.validation.labels
    assert labels is not None
    assert {r.facts["majority"] for r in results} == {labels.bincount().max().item() / 20}
    assert results[0].score == results[len(spans)].score


def test_an_ablation_measures_the_task_without_these_parts(tmp_path: Path) -> None:
    problem, workplace = small(), Workplace(tmp_path)
    asked = Ablation((problem,), (ADAPTER,), norms=("reverted",))
    training = asked.runs(lambda key: None)[0].training  # type: ignore[attr-defined]
    # a task that was trained for long, as far as the experiment can tell
    model = stirred(ADAPTER.put(problem, 0), "digits")
    save(model, "digits", workplace.task_file(training.task_key), notes={"seconds": 1.0})
    results = run_experiment(asked, tmp_path, say=lambda _: None)
    assert len({r.score for r in results}) > 3
    for result in results[1::7]:
        at = range(result.facts["first"], result.facts["last"] + 1)
        with without(model, "digits", at, norms=True):
            assert measure(model, "digits", problem, "validation", workplace) == result.score


def test_transfer_starts_from_the_source_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = (small("digits"), small("mnist"), small("fashion-mnist"))
    asked = Transfer(problems, ADAPTER, (0,))
    results = made(asked, tmp_path)
    pairs = [(r.problem, r.facts["source"]) for r in results]
    names = [p.name for p in problems]
    assert pairs[:3] == [(name, None) for name in names]
    assert set(pairs[3:]) == {(a, b) for a in names for b in names if a != b}
    run = next(run for run in asked.runs(lambda key: results[0]) if run.start is not None)
    assert run.start is not None
    started: dict[str, torch.Tensor] = {}

    def look(model: torch.nn.Module, *_: Any) -> float:
        started.update({key: tensor.clone() for key, tensor in body(model, run.problem.name).items()})
        return 0.0

    monkeypatch.setattr("visadapt.experiments.run.train", look)
    run.trained(Workplace(tmp_path))
    source = read(Workplace(tmp_path).task_file(run.start.task_key)).tensors
    assert started
    assert all(torch.equal(value, source[key]) for key, value in started.items())


def test_a_sequence_of_tasks_forgets_nothing_and_fine_tuning_does(tmp_path: Path) -> None:
    problems = (small("digits"), small("mnist"), small("fashion-mnist"))
    results = made(Sequence(problems, (ADAPTER,), FULL), tmp_path)
    own, shared = ([r for r in results if r.contender == name] for name in (ADAPTER.name, "sequential fine-tuning"))
    names = [p.name for p in problems]
    for chain in (own, shared):
        asked = [(r.facts["position"], r.facts["after"], r.problem) for r in chain]
        assert asked == [(k, names[k], names[i]) for k in range(3) for i in range(k + 1)]
    for name in names:
        assert len({r.facts["outputs"] for r in own if r.problem == name}) == 1, "bit for bit what it was"
        assert len({r.score for r in own if r.problem == name}) == 1
    for k, name in enumerate(names):
        assert len({r.facts["outputs"] for r in shared if r.problem == name}) == 3 - k, "each new task changes all"
    one = own[0].trained + own[0].head
    assert own[-1].facts["total"] == pytest.approx(1 + 3 * one / own[0].backbone)
    assert shared[-1].facts["total"] == pytest.approx(1 + 3 * own[0].head / own[0].backbone)


def test_a_task_of_a_sequence_is_the_task_alone(tmp_path: Path) -> None:
    problems = (small("digits"), small("mnist"))
    results = made(Sequence(problems, (ADAPTER,)), tmp_path)
    (alone,) = Training("compare", problems[1], ADAPTER, 0).results(("",), Workplace(tmp_path))
    assert results[-1].problem == "mnist"
    assert results[-1].score == alone.score


def test_what_no_sequence_can_be() -> None:
    with pytest.raises(VisadaptError, match="one network"):
        Sequence((small("digits"), small("mnist", options=())), (ADAPTER,))
    with pytest.raises(VisadaptError, match="each problem once"):
        Sequence((small("digits"), small("digits", train=8)), (ADAPTER,))
    with pytest.raises(VisadaptError, match="sequential fine-tuning trains all weights"):
        Sequence((small("digits"),), (ADAPTER,), ADAPTER)


def test_modality_puts_adapters_at_both_ends(tmp_path: Path) -> None:
    results = made(Modality((small(),), (FULL,), ADAPTER, (0,)), tmp_path)
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
    assert [run.facts["where"] for run in runs] == [*places, "all"]


def test_decathlon_sums_up_what_it_has_run(tmp_path: Path) -> None:
    problems = (small("digits"), small("mnist"))
    results = made(Decathlon(problems, EVERYONE[:1], FULL, (0, 1)), tmp_path)
    sums = [r for r in results if r.metric == "decathlon"]
    assert [(r.contender, r.seed) for r in sums] == [
        (name, seed) for name in (FULL.name, "linear probe") for seed in (0, 1)
    ]
    assert len(results) == 2 * 2 * 2 + len(sums)

    def accuracies(name: str, seed: int) -> dict[str, float]:
        own = [r for r in results if r.contender == name and r.seed == seed and r.metric == "accuracy"]
        return {r.problem: 100 * r.score for r in own}

    full = [accuracies(FULL.name, seed) for seed in (0, 1)]
    baselines = {name: (full[0][name] + full[1][name]) / 2 for name in full[0]}
    for result in sums:
        assert result.score == pytest.approx(score(accuracies(result.contender, result.seed), baselines))
        assert result.facts["problems"] == ["digits", "mnist"]
        assert (result.facts["seeds"], result.setting) == (2, None)
    (linear,) = (r for r in sums if r.contender == "linear probe" and r.seed == 0)
    assert linear.facts["total"] == pytest.approx(1 + 2 * 330 / linear.backbone)


def test_another_baseline_is_another_sum(tmp_path: Path) -> None:
    problems = (small("digits"),)
    one = made(Decathlon(problems, (), FULL, (0,)), tmp_path)
    longer = dataclasses.replace(FULL.with_recipe(epochs=2), name="longer")
    two = made(Decathlon(problems, (), longer, (0,)), tmp_path)
    assert one[-1].key != two[-1].key
