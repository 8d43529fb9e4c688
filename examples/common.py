"""The command line that the transfer examples share."""

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
from visadapt.experiments.base import run_experiment
from visadapt.experiments.compare import Compare
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.record import Result
from visadapt.experiments.train import Workspace, measure
from visadapt.methods import Bottleneck, Full, Linear, Norms
from visadapt.report import plot, sweep_table, table
from visadapt.task_file import load
from visadapt.training import Recipe


def parser(description: str, backbone: str, data: str, widths: Sequence[int | float]) -> argparse.ArgumentParser:
    """The options that both examples take.

    Args:
        description: of the example.
        backbone: default name.
        data: default name.
        widths: of the bottlenecks, by default.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a look in under a minute; the figures mean little")
    made.add_argument("--backbone", default=backbone, help="name, as visadapt.inject takes it")
    made.add_argument("--data", default=data, help="name or folder of the data set")
    made.add_argument("--m", type=_width, nargs="+", default=list(widths), help="widths of the bottlenecks")
    made.add_argument("--train", type=int, help="number of training samples")
    made.add_argument("--epochs", type=int, help="epochs of all but the linear probe")
    made.add_argument("--seed", type=int, default=0, help="the first seed")
    made.add_argument("--seeds", type=int, default=1, help="how many, for mean ± standard deviation")
    made.add_argument("--device", default="cpu")
    made.add_argument("--sweep", action="store_true", help="learning rates on validation data, instead of the table")
    made.add_argument("--results", type=Path, help="folder to add to; results that are there are not made again")
    made.add_argument("--markdown", type=Path, help="writes the table there")
    made.add_argument("--out", type=Path, help="folder for the best task and the figure")
    return made


def _width(text: str) -> int | float:
    width = float(text) if "." in text else int(text)
    try:
        check_width(width)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return width


def contenders(widths: Sequence[int | float], recipes: dict[str, Recipe]) -> list[Contender]:
    """The linear probe, norms only, a bottleneck of each width, full fine-tuning.

    All of them leave running statistics as they were pretrained.

    Args:
        widths: of the bottlenecks.
        recipes: by the method's name.
    """
    return [
        Contender("linear probe", Linear(), recipes["Linear"], norms="frozen"),
        Contender("norms only", Norms(), recipes["Norms"]),
        *(Contender(f"bottleneck m={m}", Bottleneck(m), recipes["Bottleneck"]) for m in widths),
        Contender("full fine-tuning", Full(), recipes["Full"]),
    ]


def main(
    args: argparse.Namespace, problem: Problem, who: Sequence[Contender], grid: dict[str, Sequence[float]], caption: str
) -> None:
    """Sweeps or compares, and reports.

    Args:
        args: from :func:`parser`.
        problem: what to compare on.
        who: is compared.
        grid: learning rates by the method's name.
        caption: says in a sentence or two what the figures were made with.
    """
    command = f"python examples/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"
    print(f"{caption}\n")
    out = args.out or Path(tempfile.mkdtemp(prefix="visadapt-"))
    out.mkdir(parents=True, exist_ok=True)
    folder = args.results or out / "results"
    if args.sweep:
        rated = tuple(dataclasses.replace(one, rates=tuple(grid[type(one.method).__name__])) for one in who)
        wanted = Compare((problem,), rated, (args.seed,), "validation")
        found = sweep_table(run_experiment(wanted, folder, device=args.device, progress=True))
        title = "Learning rates on validation data; * is picked"
        print(f"\n{title}\n{found}")
        _write(args.markdown, f"{title}. {caption} Made by `{command}`.\n\n{found.markdown()}\n")
        return
    seeds = tuple(range(args.seed, args.seed + args.seeds))
    adapters = tuple(one.name for one in who if not isinstance(one.method, Linear | Norms | Full))
    wanted = Compare((problem,), tuple(who), seeds, keep=adapters)
    results = run_experiment(wanted, folder, device=args.device, progress=True)
    shown = table(results)
    print(f"\n{shown}\n")
    best = max((result for result in results if result.contender in adapters), key=lambda result: result.score)
    (key,) = (run.task_key for run in wanted.runs(lambda key: None) if run.key == best.key)
    kept = Workspace(folder).task_file(key)
    if kept.is_file():
        reload(problem, shutil.copyfile(kept, out / f"{problem.name}.visadapt"), best, args.device)
    else:
        print("all results were on record, and the best adapter's task is not kept beside them")
    print(f"figure: {plot(results, out / f'{problem.name}.png', problem.name)}")
    _write(args.markdown, f"{caption} Made by `{command}`.\n\n{shown.markdown()}\n")


def reload(problem: Problem, file: Path, result: Result, device: str) -> None:
    """Loads a task file into a fresh backbone and shows that the accuracy is the same."""
    fresh = problem.fresh()
    name = load(fresh, file)
    score = measure(fresh, name, problem, "test", Workspace(file.parent, device))
    same = "the same" if score == result.score else f"NOT the {result.score:.4f} that it was saved with"
    print(f"{file} ({file.stat().st_size / 1e6:.2f} MB, {result.contender}) in a fresh backbone: "
          f"accuracy {score:.4f}, {same}")  # fmt: skip


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"written: {path}")
