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
    name: Annotated[str, typer.Argument(help=f"{', '.join(EXPERIMENTS)}.")],
    problem: Annotated[list[str], typer.Option(metavar="BACKBONE:DATA", help="Such as bundled/resnet50:cifar10.")],
    results: Annotated[Path, typer.Option(help="Folder of the results; those that are there are not made again.")],
    who: Annotated[
        list[str] | None,
        typer.Option(
            "--contender",
            help="Such as 'bottleneck m=8', the default, or 'full fine-tuning'; may be repeated. "
            "init_scale and transfer take one, tradeoff has its own.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Of every training but a linear probe's.")] = 3,
    samples: Annotated[int | None, typer.Option("--train", min=1, help="Training samples; all, if not given.")] = None,
    validation: Annotated[
        int | None,
        typer.Option(min=1, help=f"Validation samples; {ImageProblem.validation} pictures, all texts, if not given."),
    ] = None,
    test: Annotated[int | None, typer.Option(min=1, help="Test samples; all, if not given.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of pictures in pixels.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of a text.")] = None,
    root: Root = None,
    engine: Annotated[str, typer.Option(help="local, or ray.")] = "local",
    processes: Annotated[int, typer.Option(min=1, help="How many work at once.")] = 1,
    device: Device = "cpu",
) -> None:
    """Runs an experiment of the papers; killed, it goes on where it was."""
    check_choice(name, EXPERIMENTS, "experiment")
    asked = tuple(_problem(text, samples, validation, test, size, length, root) for text in problem)
    planned = _planned(EXPERIMENTS[name], asked, who or [], tuple(range(seeds)), epochs)
    found = run_experiment(planned, results, engine, processes, device=device or "cpu", progress=True, say=say)
    say(f"{len(found)} results in {results}")


def _problem(
    text: str, train: int | None, validation: int | None, test: int | None, size: int | None, length: int | None,
    root: Path | None,
) -> Problem:  # fmt: skip
    backbone, colon, data = text.rpartition(":")
    if not colon or not backbone or not data:
        raise VisadaptError(f"--problem takes BACKBONE:DATA, such as bundled/resnet50:cifar10, got {text!r}")
    return experiments.problem(backbone, data, train=train, validation=validation, test=test, size=size, length=length,
                               root=None if root is None else str(root))  # fmt: skip


def _planned(
    kind: type[Experiment],
    problems: tuple[Problem, ...],
    names: list[str],
    seeds: tuple[int, ...],
    epochs: int,
) -> Experiment:
    """An experiment with what it takes of all that was said.

    Raises:
        VisadaptError: it has no use for a contender that was named, or needs one with adapters.
    """
    taken = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if "contenders" not in taken and len(names) > ("who" in taken):
        takes = "one --contender" if "who" in taken else "no --contender, it has its own"
        raise VisadaptError(f"{kind.name} takes {takes}; got {', '.join(map(repr, names))}")
    who = tuple(contender(name, epochs) for name in names or ["bottleneck m=8"])
    # an adapter that has sites, and so layers; SSF, for one, has none
    deep = next((one for one in who if is_adapter(one.name) and one.method.kinds), None)
    if "deep" in taken and deep is None:
        raise VisadaptError(f"{kind.name} puts a --contender at parts of the depth: name one with adapters, such as "
                            "'bottleneck m=8'")  # fmt: skip
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
