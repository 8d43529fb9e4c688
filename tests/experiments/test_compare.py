"""Comparisons on a small real problem: what is told, what is kept, what is never looked at."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import visadapt
from tests.zoo import ZOO
from visadapt import VisadaptError
from visadapt.data import load_images
from visadapt.experiments import Contender, Problem, Record, Result, compare, fit_head, plot, run, sweep, table
from visadapt.experiments.command import contenders
from visadapt.experiments.probe import is_probe
from visadapt.training import Recipe, evaluate, fit

RECIPES = {way: Recipe(epochs=1, lr=1e-2) for way in ("Linear", "Norms", "Bottleneck", "Full")}
WHO = contenders([4], RECIPES)


@pytest.fixture(scope="module")
def problem() -> Problem:
    data = load_images("digits", size=16)
    return Problem(
        name="digits",
        build=ZOO["tiny/resnet"].make,
        labels=data.classes,
        train=data.train.subset(range(96)),
        validation=data.train.subset(range(96, 160)),
        test=data.test.subset(range(100)),
        settings={"train": 96},
    )


def test_each_contender_trains_what_its_name_says(problem: Problem) -> None:
    backbone = problem.build()
    norms = sum(p.numel() for n, p in backbone.named_parameters() if "bn" in n or "downsample.1" in n)
    whole = sum(p.numel() for n, p in backbone.named_parameters() if not n.startswith("fc."))
    adapters = sum(2 * 4 * c + c + 4 for c in (8, 8, 16, 16, 24, 24, 32, 32))
    for contender, expected in zip(WHO, (0, norms, norms + adapters, whole), strict=True):
        result, model = run(problem, contender)
        assert result.trained == expected, contender.name
        assert result.backbone == whole
        assert result.head == 32 * 10 + 10
        assert result.bytes > 4 * (result.trained + result.head)
        assert result.fraction == expected / whole
        assert 0 <= result.accuracy <= 1
        assert result.accuracy == evaluate(model, "digits", problem.test)["accuracy"]
        assert is_probe(model, "digits") is (contender.name == "linear probe")


def test_results_are_kept_and_not_made_again(problem: Problem, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "results.jsonl"
    seen: list[str] = []

    def done(result: Result, model: torch.nn.Module) -> None:
        seen.append(result.contender)

    first = compare(problem, WHO[:2], [0], Record(file), say=lambda _: None, done=done)
    assert seen == ["linear probe", "norms only"]
    more = compare(problem, WHO[:3], [0, 1], Record(file), say=lambda _: None, done=done)
    assert more[:2] == first
    assert seen == ["linear probe", "norms only", "bottleneck m=4", "linear probe", "norms only", "bottleneck m=4"]
    assert len(file.read_text().splitlines()) == 6
    changed = dataclasses.replace(problem, settings={"train": 95})
    compare(changed, WHO[:1], [0], Record(file), say=lambda _: None, done=done)
    assert len(seen) == 7, "another setting is another result"
    file.write_text("{}\n")
    with pytest.raises(VisadaptError, match=r"results.jsonl, line 1 is no result"):
        Record(file)


def test_the_table_has_mean_and_deviation_of_the_seeds() -> None:
    common: dict[str, Any] = {"problem": "p", "split": "test", "trained": 30, "head": 5, "backbone": 1000}
    common |= {"seconds": 2.0, "bytes": 4_000_000, "lr": 1e-3, "epochs": 3}
    results = [Result(key=str(s), contender="a", seed=s, accuracy=a, **common) for s, a in enumerate((0.5, 0.6, 0.7))]
    shown = table(results)
    assert list(shown.rows[0]) == ["a", "60.0 ± 10.0", "30", "3.00 %", "5", "2", "4.00 MB"]
    assert "±" not in str(table(results[:1]))


def test_the_sweep_looks_at_validation_data_only(problem: Problem, tmp_path: Path) -> None:
    blind = dataclasses.replace(problem, test=None)
    file = tmp_path / "sweep.jsonl"
    grid = {"Linear": (1e-5, 1e-1), "Bottleneck": (1e-5, 3e-2)}
    who = [WHO[0].with_recipe(epochs=20), WHO[2].with_recipe(epochs=4)]
    shown, best = sweep(blind, who, grid, Record(file), say=lambda _: None)
    assert best == {"linear probe": 1e-1, "bottleneck m=4": 3e-2}
    assert "0.1: " in str(shown)
    assert str(shown).count("*") == 2
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["split"] for line in lines} == {"validation"}
    assert [line["lr"] for line in lines] == [1e-5, 1e-1, 1e-5, 3e-2]


def test_a_probe_on_cached_features_is_a_probe(problem: Problem) -> None:
    recipe = Recipe(epochs=3, lr=1e-2)
    models = [WHO[0].put(problem, 0) for _ in range(2)]
    fit_head(models[0], "digits", problem.train, recipe, seed=4)
    fit(models[1], "digits", problem.train, recipe=recipe, seed=4)
    found = [dict(visadapt.named_parameters(model, "digits")) for model in models]
    for name, parameter in found[0].items():
        assert torch.allclose(parameter, found[1][name], atol=1e-5), name
    with pytest.raises(VisadaptError, match="task 'digits' is no linear probe"):
        fit_head(WHO[1].put(problem, 0), "digits", problem.train, recipe)


def test_contenders_start_alike_for_the_same_seed(problem: Problem) -> None:
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    contender = Contender("b", visadapt.Bottleneck(4), Recipe())
    a, b, c = (contender.put(problem, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected), "the caller's random numbers moved"
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_the_plot_is_a_picture_with_a_point_for_each(tmp_path: Path) -> None:
    common: dict[str, Any] = {"problem": "p", "split": "test", "head": 5, "backbone": 1000, "seconds": 2.0}
    common |= {"bytes": 1, "lr": 1e-3, "epochs": 3}
    results = [
        Result(key=f"{n}{s}", contender=n, seed=s, accuracy=0.5 + 0.1 * s, trained=t, **common)
        for n, t in (("linear probe", 0), ("adapter", 30), ("full", 1000))
        for s in (0, 1)
    ]
    svg = plot(results, tmp_path / "made" / "p.svg", "a title").read_text()
    assert "<svg" in svg
    assert plot(results[:1], tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
