"""The command line of the transfer examples."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from visadapt.checks import check_width
from visadapt.experiments import Compare, Contender, Problem, Result, run_experiment
from visadapt.experiments.catalogue import is_adapter
from visadapt.experiments.train import Workspace, measure
from visadapt.methods import Bottleneck, Full, Linear, Norms
from visadapt.report import plot, sweep_table, table
from visadapt.task_file import load
from visadapt.training import Recipe


def parser(description: str, backbone: str, data: str, widths: Sequence[int | float]) -> argparse.ArgumentParser:
    """Build a parser with the options of both examples.

    Args:
        description: description of the example.
        backbone: name of the default backbone.
        data: name of the default data set.
        widths: default widths of the bottlenecks.

    Returns:
        The parser.
    """
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--quick", action="store_true", help="run in under a minute; too short for meaningful scores")
    options.add_argument("--backbone", default=backbone, help="name, as visadapt.inject takes it")
    options.add_argument("--data", default=data, help="name or folder of the data set")
    options.add_argument("--m", type=_width, nargs="+", default=list(widths), help="widths of the bottlenecks")
    options.add_argument("--train", type=int, help="number of training samples")
    options.add_argument("--epochs", type=int, help="epochs, except for the linear probe")
    options.add_argument("--seed", type=int, default=0, help="first seed")
    options.add_argument("--seeds", type=int, default=1, help="number of seeds, for mean ± standard deviation")
    options.add_argument("--device", default="cpu", help="device to compute on")
    options.add_argument("--sweep", action="store_true", help="compare learning rates on validation data instead")
    options.add_argument("--results", type=Path, help="folder of the results; existing ones are not computed again")
    options.add_argument("--markdown", type=Path, help="Markdown file to write the table to")
    options.add_argument("--out", type=Path, help="folder for the best task and the figure")
    return options


def _width(text: str) -> int | float:
    width = float(text) if "." in text else int(text)
    try:
        check_width(width)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return width


def contenders(widths: Sequence[int | float], recipes: dict[str, Recipe]) -> list[Contender]:
    """Return a linear probe, norms only, a bottleneck of each width, and full fine-tuning.

    All of them keep the pretrained running statistics.

    Args:
        widths: widths of the bottlenecks.
        recipes: recipes by the name of the method.

    Returns:
        The contenders, by increasing number of trained parameters.
    """
    return [
        Contender("linear probe", Linear(), recipes["Linear"], norms="frozen"),
        Contender("norms only", Norms(), recipes["Norms"]),
        *(Contender(f"bottleneck m={m}", Bottleneck(m), recipes["Bottleneck"]) for m in widths),
        Contender("full fine-tuning", Full(), recipes["Full"]),
    ]


def main(
    args: argparse.Namespace,
    problem: Problem,
    compared: Sequence[Contender],
    grid: dict[str, Sequence[float]],
    caption: str,
) -> None:
    """Sweep learning rates or compare contenders, and report the results.

    Args:
        args: the options of :func:`parser`.
        problem: problem to compare on.
        compared: contenders to compare.
        grid: learning rates by the name of the method.
        caption: one or two sentences on the data and the training.
    """
    command = f"python examples/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"
    print(f"{caption}\n")
    out = args.out or Path(tempfile.mkdtemp(prefix="visadapt-"))
    out.mkdir(parents=True, exist_ok=True)
    folder = args.results or out / "results"
    if args.sweep:
        rated = tuple(dataclasses.replace(each, rates=tuple(grid[type(each.method).__name__])) for each in compared)
        sweep = Compare((problem,), rated, (args.seed,), "validation")
        rates = sweep_table(run_experiment(sweep, folder, device=args.device, progress=True))
        title = "Learning rates on validation data; * marks the best"
        print(f"\n{title}\n{rates}")
        _write(args.markdown, f"{title}. {caption} Made by `{command}`.\n\n{rates.markdown()}\n")
        return
    seeds = tuple(range(args.seed, args.seed + args.seeds))
    adapters = tuple(each.name for each in compared if is_adapter(each.name))
    comparison = Compare((problem,), tuple(compared), seeds, keep=adapters)
    results = run_experiment(comparison, folder, device=args.device, progress=True)
    scores = table(results)
    print(f"\n{scores}\n")
    best = max((result for result in results if result.contender in adapters), key=lambda result: result.score)
    (key,) = (run.task_key for run in comparison.runs(lambda key: None) if run.key == best.key)
    task_file = Workspace(folder).task_file(key)
    if task_file.is_file():
        reload(problem, shutil.copyfile(task_file, out / f"{problem.name}.visadapt"), best, args.device)
    else:
        print("all results existed already, and the best adapter's task file was not kept with them")
    print(f"figure: {plot(results, out / f'{problem.name}.png', problem.name)}")
    _write(args.markdown, f"{caption} Made by `{command}`.\n\n{scores.markdown()}\n")


def reload(problem: Problem, file: Path, result: Result, device: str) -> None:
    """Load a task file into a new backbone, and print whether the accuracy is the same."""
    model = problem.fresh()
    name = load(model, file)
    score = measure(model, name, problem, "test", Workspace(file.parent, device))
    same = "the same" if score == result.score else f"NOT the {result.score:.4f} that was measured before"
    print(f"{file} ({file.stat().st_size / 1e6:.2f} MB, {result.contender}) in a new backbone: "
          f"accuracy {score:.4f}, {same}")  # fmt: skip


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"written: {path}")
