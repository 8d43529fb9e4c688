"""Compares contenders on a problem, and finds each its learning rate on validation data."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn

from visadapt.experiments.contender import Contender
from visadapt.experiments.probe import fit_head, is_probe
from visadapt.experiments.problem import Problem
from visadapt.experiments.record import Record, Result, key_of
from visadapt.store import save
from visadapt.table import Table
from visadapt.tasks import summary
from visadapt.training import evaluate, fit

Say = Callable[[str], None]


def run(
    problem: Problem,
    contender: Contender,
    seed: int = 0,
    *,
    split: str = "test",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> tuple[Result, nn.Module]:
    """Trains a contender once, without looking at any but its training data, and measures it.

    Args:
        problem: what to train on.
        contender: whom.
        seed: of the new parts, the order and dropout.
        split: ``test`` or ``validation``: what to measure on.
        device: None for the CPU.
        progress: shows a bar on a terminal.

    Returns:
        The result and the trained model, whose task has the problem's name.
    """
    task = problem.name
    model = contender.put(problem, seed)
    train, recipe, prepare = problem.train, contender.recipe, problem.prepare
    start = time.perf_counter()
    if is_probe(model, task):
        fit_head(model, task, train, recipe, prepare=prepare, seed=seed, device=device, progress=progress)
    else:
        fit(
            model,
            task,
            train,
            None,
            recipe,
            prepare=prepare,
            augment=problem.augment,
            seed=seed,
            device=device,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    data = problem.test if split == "test" else problem.validation
    accuracy = evaluate(model, task, data, ("accuracy",), prepare=prepare)["accuracy"]
    costs = summary(model)
    result = Result(
        key=_key(problem, contender, seed, split),
        experiment="compare",
        modality="text" if isinstance(getattr(problem.train, "inputs", None), dict) else "image",
        network=str(problem.settings.get("backbone", "")).rpartition("/")[2],
        problem=problem.name,
        contender=contender.name,
        seed=seed,
        split=split,
        metric="accuracy",
        score=accuracy,
        trained=costs[task].adapters + costs[task].norms,
        head=costs[task].head,
        backbone=costs.backbone,
        seconds=seconds,
        bytes=_file_size(model, task),
        lr=recipe.lr,
        epochs=recipe.epochs,
    )
    return result, model


def _key(problem: Problem, contender: Contender, seed: int, split: str) -> str:
    return key_of(
        problem=problem.name, settings=problem.settings, contender=contender.described(), seed=seed, split=split
    )


def _file_size(model: nn.Module, task: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return save(model, task, Path(folder) / "task.visadapt").stat().st_size


def compare(
    problem: Problem,
    contenders: Sequence[Contender],
    seeds: Sequence[int],
    record: Record,
    *,
    device: torch.device | str | None = None,
    say: Say = print,
    done: Callable[[Result, nn.Module], None] = lambda *_: None,
) -> list[Result]:
    """Every contender with every seed, on the test data; what the record has already is not trained again.

    Args:
        problem: what to compare on.
        contenders: whom.
        seeds: each a training.
        record: of results.
        device: None for the CPU.
        say: takes a line for each result.
        done: called with each new result and the trained model.

    Returns:
        The results, seed by seed.
    """
    found = []
    for seed in seeds:
        for contender in contenders:
            result = record.get("compare", _key(problem, contender, seed, "test"))
            if result is None:
                result, model = run(problem, contender, seed, device=device)
                record.add(result)
                done(result, model)
            say(f"seed {seed}  {contender.name:<18} accuracy {result.score:.4f}  {result.seconds:6.1f} s")
            found.append(result)
    return found


def sweep(
    problem: Problem,
    contenders: Sequence[Contender],
    grid: dict[str, Sequence[float]],
    record: Record,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    say: Say = print,
) -> tuple[Table, dict[str, float]]:
    """Each contender at each learning rate of its grid, on validation data; the test data is not looked at.

    Args:
        problem: what to train on.
        contenders: whom.
        grid: learning rates by the method's name.
        record: of results.
        seed: of every training.
        device: None for the CPU.
        say: takes a line for each result.

    Returns:
        A table of validation accuracies, the best of each contender starred, and the best rate by contender's name.
    """
    rows, best = [], {}
    for contender in contenders:
        scores: dict[float, float] = {}
        for lr in grid[contender.way]:
            tried = contender.with_recipe(lr=lr)
            result = record.get("compare", _key(problem, tried, seed, "validation"))
            if result is None:
                result, _ = run(problem, tried, seed, split="validation", device=device)
                record.add(result)
            say(f"{contender.name:<18} lr {lr:g}  validation {result.score:.4f}  {result.seconds:6.1f} s")
            scores[lr] = result.score
        best[contender.name] = max(scores, key=lambda lr: scores[lr])
        cells = [f"{lr:g}: {100 * s:.1f}{' *' if lr == best[contender.name] else ''}" for lr, s in scores.items()]
        rows.append((contender.name, contender.recipe.epochs, "   ".join(cells), f"{best[contender.name]:g}"))
    return Table(("method", "epochs", "validation accuracy in % by learning rate", "picked"), rows), best


def table(results: Sequence[Result], title: str = "") -> Table:
    """One row a contender: accuracy (mean and standard deviation over seeds), parameters, seconds, file size."""
    rows = []
    for name in dict.fromkeys(result.contender for result in results):
        own = [result for result in results if result.contender == name]
        scores = [100 * result.score for result in own]
        spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
        first = own[0]
        rows.append(
            (
                name,
                f"{mean(scores):.1f}{spread}",
                f"{first.trained:,}",
                f"{100 * first.fraction:.2f} %",
                f"{first.head:,}",
                f"{mean(result.seconds for result in own):.0f}",
                f"{first.bytes / 1e6:.2f} MB",
            )
        )
    headings = ("method", "accuracy, %", "trained", "of backbone", "head", "seconds", "file")
    return Table(headings, rows, title)
