"""``visadapt experiment``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from visadapt import experiments
from visadapt.checks import check_choice
from visadapt.cli.comparison import conclude, described
from visadapt.cli.given import refuse_unused
from visadapt.cli.options import Build, Device, Root, pairs
from visadapt.cli.output import say
from visadapt.cli.table_options import TableOptions, with_table
from visadapt.errors import VisadaptError
from visadapt.experiments import (
    Compare,
    Crossmodal,
    Experiment,
    ImageProblem,
    Problem,
    TextProblem,
    contender,
    run_experiment,
)
from visadapt.experiments.catalogue import FULL, is_adapter
from visadapt.experiments.duration import by_problem, finished, forecast, readable
from visadapt.experiments.executors import get_engine
from visadapt.experiments.fair import comparisons, costs, matched
from visadapt.experiments.machine import computes_in_bf16
from visadapt.training.engine import check_device

EXPERIMENTS: dict[str, type[Experiment]] = {
    cls.name: cls
    for cls in (
        Compare,
        Crossmodal,
        experiments.Tradeoff,
        experiments.Ablation,
        experiments.InitScale,
        experiments.Sequence,
        experiments.Transfer,
        experiments.Modality,
        experiments.Decathlon,
    )
}


@with_table()
def experiment(
    name: Annotated[str, typer.Argument(help=f"Experiment: {', '.join(EXPERIMENTS)}.")],
    problem: Annotated[
        list[str],
        typer.Option(metavar="BACKBONE:DATA", help="Backbone and data, such as bundled/resnet50:cifar10; repeatable."),
    ],
    results: Annotated[Path, typer.Option(help="Folder of results; runs that are already there are not repeated.")],
    table: TableOptions,
    who: Annotated[
        list[str] | None,
        typer.Option(
            "--contender",
            help="What to compare, such as 'bottleneck m=8' or 'full fine-tuning'; repeatable. Default: 'bottleneck "
            "m=8', of compare also 'linear probe' and 'full fine-tuning'. init_scale and transfer take one; crossmodal "
            "takes one bottleneck, the width of which is that of the first problem; tradeoff has its own.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Number of seeds, counted from 0.")] = 3,
    epochs: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Epochs of every training run except linear probes. compare and crossmodal choose among several on "
            "validation data: repeatable; default: 3, 9 and 20, of images 5, 9 and 20, and multiples of them where the "
            "first would be fewer than 100 steps. Default of the others: 3.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--train", min=1, help="Number of training samples; default: all.")
    ] = None,
    validation: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of validation samples; default: all of the set's own, or of images a fifth of the training "
            "samples (at most 500), of texts a tenth.",
        ),
    ] = None,
    test: Annotated[int | None, typer.Option(min=1, help="Number of test samples; default: all.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Image side in pixels; default: 64.")] = None,
    augment: Annotated[
        bool | None,
        typer.Option(
            help="Move training images at random by up to an eighth of their side; default: in compare and crossmodal."
        ),
    ] = None,
    mirror: Annotated[
        bool,
        typer.Option("--mirror", help="Also mirror half of them: not for signs, digits and characters."),
    ] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Train in bf16 autocast: faster where the hardware computes in bf16.")
    ] = False,
    length: Annotated[int | None, typer.Option(min=1, help="Maximum tokens per text; default: 64.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Metric that chooses and is reported, such as macro_f1 where classes are imbalanced; default: "
            "accuracy, for several labels per sample mean_ap, for real values pearson."
        ),
    ] = None,
    root: Root = None,
    build: Build = None,
    engine: Annotated[str, typer.Option(help="Where runs execute: local, or ray.")] = "local",
    processes: Annotated[int, typer.Option(min=1, help="Number of worker processes.")] = 1,
    device: Device = "cpu",
) -> None:
    """Run an experiment from the papers; resumes if interrupted.

    compare gives every contender the same care. With the first seed and on validation data of each problem it chooses
    the learning rate (from a grid that is extended while its best is at an edge), the number of epochs, and whether a
    bottleneck has an activation; every run keeps the state after its best epoch on validation data, the linear probe
    that the head starts as among them. It says beforehand how long that takes, and at the end prints the differences
    from full fine-tuning, paired by problem and seed, with 95 % intervals, and which method to take.
    """
    check_choice(name, EXPERIMENTS, "experiment")
    if mirror and augment is False:
        raise VisadaptError("--mirror is a part of --augment, and --no-augment was given: leave one of them out")
    comparing = EXPERIMENTS[name] in (Compare, Crossmodal)
    shifted = mirror or (comparing if augment is None else augment)
    given: dict[str, Any] = {"train": samples, "validation": validation, "test": test, "size": size, "length": length}
    given |= {"scored_by": metric, "options": tuple(pairs(build, "--build").items()) or None}
    changed = {"augment": None if not shifted else "shift and mirror" if mirror else "shift"}
    problems = tuple(_problem(text, root, given, changed, table) for text in problem)
    if not any(isinstance(each, ImageProblem) for each in problems):
        refuse_unused("all problems are of texts", "size", "augment", "mirror", "image")
    if not any(isinstance(each, TextProblem) for each in problems):
        refuse_unused("all problems are of images", "length", "text")
    if all(each.network.startswith("bundled/") for each in problems):
        refuse_unused("bundled backbones have their own weights", "build")
    if not any(each.uses_root for each in problems):
        refuse_unused("the data of every problem is found without it", "root")
    _check_distinct([f"{each.backbone} {each.name}" for each in problems], "--problem")
    _check_distinct([contender(each).name for each in who or ()], "--contender")
    if results.is_file():
        raise VisadaptError(f"--results must be a folder, got the file {results}")
    get_engine(engine)
    if engine == "local":
        check_device(device or "cpu")
    numbers = tuple(range(seeds))
    plans: Sequence[Experiment]
    fair: list[Compare | Crossmodal] = []
    lines: list[str] = []
    if comparing:
        fair = _fair(name, problems, who or [], numbers, tuple(sorted(set(epochs or ()))), fast)
        plans = fair
        groups = [group for plan in fair for group in by_problem(plan)]
        if not any(each.lengths for _, contenders in groups for each in contenders):
            refuse_unused("a linear probe has epochs and a precision of its own", "epochs", "fast")
        for each, contenders in groups:
            lines += described(each, () if epochs else max(contender.lengths for contender in contenders))
        for contenders in dict.fromkeys(contenders for _, contenders in groups):
            lines += costs(contenders, seeds)
    elif fast or len(epochs or ()) > 1:
        raise VisadaptError(
            f"{'--fast' if fast else 'several --epochs'} can be given to compare and crossmodal only, not to {name}"
        )
    else:
        plans = [_planned(EXPERIMENTS[name], problems, who or [], numbers, (epochs or [3])[0])]
    for line in lines:
        say(line)
    if comparing and engine == "local" and not finished(plans, results):
        least, most = map(readable, forecast(fair, device or "cpu"))
        say(f"a few steps of each were timed: all will take {least} to {most} here; an interrupted run resumes")
        if not fast and computes_in_bf16(device or "cpu"):
            say("this device computes in bf16: --fast takes less time, for every contender but the linear probe")
    made = [
        result
        for plan in plans
        for result in run_experiment(plan, results, engine, processes, device=device or "cpu", progress=True, say=say)
    ]
    say(f"{len(made)} results in {results}")
    if comparing:
        conclude(made)
    say(f"next: visadapt report {results} --out report")


def _fair(
    name: str,
    problems: Sequence[Problem],
    names: list[str],
    seeds: tuple[int, ...],
    epochs: tuple[int, ...],
    fast: bool,
) -> list[Compare | Crossmodal]:
    if name == Compare.name:
        return [*comparisons(problems, names, seeds, epochs, fast)]
    if len(names) > 1:
        raise VisadaptError(f"--contender of {name} must be one bottleneck, got {', '.join(map(repr, names))}")
    return [matched(problems, names[0] if names else "bottleneck m=8", seeds, epochs, fast)]


def _check_distinct(names: Sequence[str], given: str) -> None:
    """Refuse what results could not tell apart: its scores would be averaged, and count as several pairs."""
    again = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if again is not None:
        raise VisadaptError(f"{given} must be different each time, got {again!r} twice: results are known by this name")


def _problem(
    text: str, root: Path | None, given: dict[str, Any], changed: dict[str, str | None], table: TableOptions
) -> Problem:
    backbone, colon, data = text.rpartition(":")
    if not colon or not backbone or not data:
        raise VisadaptError(f"--problem must be BACKBONE:DATA, such as bundled/resnet50:cifar10, got {text!r}")
    if backbone.startswith("bundled/"):
        given = {**given, "options": None}  # its weights are the point of it
    plain = experiments.problem(backbone, data, root=None if root is None else str(root))
    # of several problems, images have a size and texts a length
    taken = {field.name for field in dataclasses.fields(plain)}
    other = "text" if isinstance(plain, ImageProblem) else "image"
    columns = {key: tuple(each) if isinstance(each, list) else each for key, each in table.given.items()}
    options = {**{key: value for key, value in given.items() if value is not None}, **changed}
    options["table"] = tuple((key, value) for key, value in columns.items() if key != other)
    return dataclasses.replace(plain, **{key: value for key, value in options.items() if key in taken})  # type: ignore[arg-type]


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
