"""``visadapt experiment``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from visadapt import experiments
from visadapt.checks import check_choice
from visadapt.cli.options import Device, Root
from visadapt.cli.output import say
from visadapt.errors import VisadaptError
from visadapt.experiments import Experiment, ImageProblem, Problem, contender, run_experiment
from visadapt.experiments.catalogue import FULL, is_adapter

EXPERIMENTS: dict[str, type[Experiment]] = {
    cls.name: cls
    for cls in (
        experiments.Compare,
        experiments.Tradeoff,
        experiments.Ablation,
        experiments.InitScale,
        experiments.Sequence,
        experiments.Transfer,
        experiments.Modality,
        experiments.Decathlon,
    )
}


def experiment(
    name: Annotated[str, typer.Argument(help=f"Experiment: {', '.join(EXPERIMENTS)}.")],
    problem: Annotated[
        list[str],
        typer.Option(metavar="BACKBONE:DATA", help="Backbone and data, such as bundled/resnet50:cifar10; repeatable."),
    ],
    results: Annotated[Path, typer.Option(help="Folder of results; runs that are already there are not repeated.")],
    who: Annotated[
        list[str] | None,
        typer.Option(
            "--contender",
            help="What to compare, such as 'bottleneck m=8' (default) or 'full fine-tuning'; repeatable. "
            "init_scale and transfer take one; tradeoff has its own.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Number of seeds, counted from 0.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of every training run except linear probes.")] = 3,
    samples: Annotated[
        int | None, typer.Option("--train", min=1, help="Number of training samples; default: all.")
    ] = None,
    validation: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Number of validation samples; default: {ImageProblem.validation} images, all texts."
        ),
    ] = None,
    test: Annotated[int | None, typer.Option(min=1, help="Number of test samples; default: all.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Image side in pixels.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Maximum tokens per text.")] = None,
    root: Root = None,
    engine: Annotated[str, typer.Option(help="Where runs execute: local, or ray.")] = "local",
    processes: Annotated[int, typer.Option(min=1, help="Number of worker processes.")] = 1,
    device: Device = "cpu",
) -> None:
    """Run an experiment from the papers; resumes if interrupted."""
    check_choice(name, EXPERIMENTS, "experiment")
    problems = tuple(_problem(text, samples, validation, test, size, length, root) for text in problem)
    plan = _planned(EXPERIMENTS[name], problems, who or [], tuple(range(seeds)), epochs)
    made = run_experiment(plan, results, engine, processes, device=device or "cpu", progress=True, say=say)
    say(f"{len(made)} results in {results}")


def _problem(
    text: str,
    train: int | None,
    validation: int | None,
    test: int | None,
    size: int | None,
    length: int | None,
    root: Path | None,
) -> Problem:
    backbone, colon, data = text.rpartition(":")
    if not colon or not backbone or not data:
        raise VisadaptError(f"--problem must be BACKBONE:DATA, such as bundled/resnet50:cifar10, got {text!r}")
    return experiments.problem(
        backbone,
        data,
        train=train,
        validation=validation,
        test=test,
        size=size,
        length=length,
        root=None if root is None else str(root),
    )


def _planned(
    kind: type[Experiment],
    problems: tuple[Problem, ...],
    names: list[str],
    seeds: tuple[int, ...],
    epochs: int,
) -> Experiment:
    """Build an experiment from the options that its class takes.

    Raises:
        VisadaptError: the experiment does not use a contender that was given, or needs one with adapters.
    """
    taken = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if "contenders" not in taken and len(names) > ("who" in taken):
        takes = "one, with adapters" if "who" in taken else "left out, since it has its own"
        raise VisadaptError(f"--contender of {kind.name} must be {takes}, got {', '.join(map(repr, names))}")
    who = tuple(contender(name, epochs) for name in names or ["bottleneck m=8"])
    # an adapter with sites, and so with a depth; SSF has none
    deep = next((one for one in who if is_adapter(one.name) and one.method.kinds), None)
    if "deep" in taken and deep is None:
        raise VisadaptError(
            f"{kind.name} varies the depth of adapters: give a --contender that has some, such as 'bottleneck m=8'"
        )
    full = contender(FULL, epochs)
    offered: dict[str, Any] = {
        "problems": problems,
        "contenders": who,
        "who": who[0],
        "sequential": full,
        "baseline": full,
        "deep": deep,
        "seeds": seeds,
        "epochs": epochs,
    }
    return kind(**{key: value for key, value in offered.items() if key in taken})
