"""Test the papers' claims on real images and texts; an interrupted run resumes.

python -m benchmarks.evidence results --device cpu                       # in the background, resumable
python -m benchmarks.evidence results --device cuda --budget 480 --processes 14
python -m benchmarks.evidence results --glue FOLDER --gtsrb FILE.zip --omniglot FILE.zip --elpv FILE.zip \
    --vgg16 FILE.safetensors --minilm FOLDER
visadapt report benchmarks/results/evidence-cpu.csv --out docs/results

The folder of --glue contains sst2, cola, mrpc, rte and trec as they are distributed; --gtsrb, --omniglot and --elpv are
zip files of folders of images; --vgg16 contains the convolutions of VGG-16; --minilm is for machines where the package
of MiniLM is not installed. Problems on missing data are left out.

The device chooses the regime: sizes, epochs and precision (see benchmarks/regimes.py). Results carry its name, and a
report refuses those of two regimes. Stages are in order of priority; the first answers whether small adapters reach
full fine-tuning, one seed after another on all problems, so that whatever is done when the budget ends is balanced.
All are one stream of training runs, so that no process waits for the others. New results are written to the CSV file
every 20 seconds and at the end; runs that are in progress 5 seconds after the end of the budget are abandoned.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from benchmarks.figures import RESULTS
from benchmarks.lab import Lab, Over
from benchmarks.regimes import REGIMES, Data, Regime
from visadapt.data.tokenizers import MINILM, minilm_path
from visadapt.errors import VisadaptError, nearest
from visadapt.experiments import (
    Ablation,
    Compare,
    Crossmodal,
    Experiment,
    InitScale,
    Modality,
    Problem,
    Tradeoff,
    Transfer,
)
from visadapt.experiments import Sequence as LearnInTurn
from visadapt.training.recipe import COMPILE_MODES

FULL = "full fine-tuning"

BARS = {
    "image": (FULL, "linear probe", "lora r=9 where=conv", "bottleneck m=8", "convadapter"),
    "text": (FULL, "linear probe", "lora r=16 where=linear", "bottleneck m=8", "lora r=8"),
}
"""What decides whether a method with at most 3.6 % of the backbone reaches full fine-tuning; the first three first."""

MORE = {
    "image": ("norms only", "lora r=8", "bottleneck m=8 activation=None", "bottleneck m=8 activation=gelu", "dora",
              "mona", "colora", "ladder", "bottleneck m=8 scale=channel drop_path=0.1"),
    "text": ("norms only", "bottleneck m=32", "dora", "ladder", "bottleneck m=8 scale=channel drop_path=0.1"),
}  # fmt: skip

Stage = Callable[[Data, Regime], Iterator[Experiment]]
"""Yields experiments in order of priority."""


def alternating(data: Data, regime: Regime) -> list[Problem]:
    """Return texts and images in turn, so that an interrupted run has results of both."""
    pairs = zip_longest(data.texts(regime), data.images(regime))
    return [each for pair in pairs for each in pair if each is not None]


def by_modality(data: Data, regime: Regime) -> list[tuple[Problem, ...]]:
    """Return the problems on texts and those on images, without a modality that has none."""
    return [problems for problems in (data.texts(regime), data.images(regime)) if problems]


def compared(problems: Sequence[Problem], regime: Regime, names: Mapping[str, tuple[str, ...]]) -> Iterator[Compare]:
    """Compare contenders on problems, seed by seed."""
    for count in range(1, len(regime.seeds) + 1):
        for each in problems:
            contenders = regime.contenders(names[each.modality], each)
            kept = tuple(contender.name for contender in contenders)
            yield Compare((each,), contenders, regime.seeds[:count], "both", kept)


def bars(data: Data, regime: Regime) -> Iterator[Experiment]:
    problems = alternating(data, regime)
    for count in regime.first:
        yield from compared(problems[:count], regime, {each: names[:3] for each, names in BARS.items()})
    yield from compared(problems, regime, BARS)


def transfer(data: Data, regime: Regime) -> Iterator[Experiment]:
    """Start every problem from the adapters of every other one: the two transplant matrices."""
    for problems in by_modality(data, regime):
        yield Transfer(problems[:6], regime.settled("bottleneck m=8", problems[0]), regime.seeds[:3])


def sequence(data: Data, regime: Regime) -> Iterator[Experiment]:
    for problems in by_modality(data, regime):
        bottleneck, full = (regime.settled(name, problems[0]) for name in ("bottleneck m=8", FULL))
        yield LearnInTurn(problems[:6], (bottleneck,), full, regime.seeds[:3])


def modality(data: Data, regime: Regime) -> Iterator[Experiment]:
    """Put a bottleneck into the first and into the last layers only."""
    for problems in by_modality(data, regime):
        yield Modality(problems[:2], (), regime.settled("bottleneck m=8", problems[0]), regime.seeds[:3])


def ablation(data: Data, regime: Regime) -> Iterator[Experiment]:
    for problems in by_modality(data, regime):
        yield Ablation(problems[:2], (regime.settled("bottleneck m=32", problems[0]),), regime.seeds[:3])


def init_scale(data: Data, regime: Regime) -> Iterator[Experiment]:
    for problems in by_modality(data, regime):
        yield InitScale(problems[:2], regime.settled("bottleneck m=32", problems[0]), seeds=regime.seeds[:3])


def tradeoff(data: Data, regime: Regime) -> Iterator[Experiment]:
    widths = {"text": (1, 8, 64, 256), "image": (2, 8, 32, 128)}
    for problems in by_modality(data, regime):
        epochs = regime.settled(FULL, problems[0]).recipe.epochs
        yield Tradeoff(problems[:2], widths=widths[problems[0].modality], seeds=regime.seeds[:3], epochs=epochs)


def crossmodal(data: Data, regime: Regime) -> Iterator[Experiment]:
    """Put the same bottleneck into backbones of several families, at about the same fraction of each.

    Those with bundled weights come first. There is no pretrained text encoder of twelve layers to be had offline.
    """
    problems = [problems[0] for problems in by_modality(data, regime)]
    if data.vgg16 is not None:
        problems.append(data.images(regime, str(data.vgg16))[0])
    problems += [data.images(regime, name, options=(("pretrained", False),))[0] for name in RANDOM]
    groups = []
    for each in problems:
        width = WIDTHS.get(each.backbone, WIDTHS["minilm"])
        names = (FULL, "linear probe", f"bottleneck m={width}", *OTHERS.get(each.backbone, ()))
        groups.append(regime.contenders(names, each))
    yield Crossmodal(tuple(problems), tuple(groups), regime.seeds[:3])


RANDOM = ("timm/convnext_atto", "timm/vit_tiny_patch16_224")
"""Backbones with random weights."""

WIDTHS = {"minilm": 32, "resnet50": 8, "vgg16": 23, "convnext_atto": 10, "vit_tiny_patch16_224": 7}
"""Widths with which a bottleneck and its norms are about 1.35 % of the backbone."""

OTHERS = {"convnext_atto": ("colora",)}
"""Methods that are made for a family."""


def more_methods(data: Data, regime: Regime) -> Iterator[Experiment]:
    yield from compared(alternating(data, regime), regime, MORE)


STAGES: tuple[Stage, ...] = (
    bars,
    transfer,
    ablation,
    modality,
    sequence,
    init_scale,
    tradeoff,
    crossmodal,
    more_methods,
)
"""In order of priority."""


def planned(stages: Iterable[Stage], data: Data, regime: Regime) -> Iterator[Experiment]:
    """Yield the experiments of all stages, and print the name of each stage when it is reached."""
    for stage in stages:
        print(f"{stage.__name__}:", flush=True)
        yield from stage(data, regime)


def encoder_of(folder: Path | None) -> str | None:
    """Return the backbone for texts; None, with a line that says so, if there is none.

    A folder with the files of the bundled MiniLM is the bundled one, whose results it gives. Its path is in the
    environment, which the processes of a pool inherit.
    """
    if folder is not None:
        os.environ[MINILM] = str(folder)
    try:
        minilm_path()
    except VisadaptError as error:
        os.environ.pop(MINILM, None)
        if folder is None or not (folder / "config.json").is_file():
            print(f"texts are left out: {error}", flush=True)
            return None
        print(f"results of this encoder are not those of the bundled one: {error}", flush=True)
        return f"hf/{folder}"
    return "bundled/minilm"


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options for data and weights that are not bundled."""
    parser.add_argument("--glue", type=Path, help="folder of sst2, cola, mrpc, rte and trec")
    parser.add_argument("--gtsrb", type=Path, help="zip file of a folder of traffic signs")
    parser.add_argument("--omniglot", type=Path, help="zip file of a folder of characters")
    parser.add_argument("--elpv", type=Path, help="zip file of a folder of solar cells")
    parser.add_argument("--vgg16", type=Path, help="safetensors file of VGG-16's convolutions")
    parser.add_argument("--minilm", type=Path, help="folder of MiniLM's files, if its package is not installed")


def data_of(args: argparse.Namespace) -> Data:
    """Return the data of these options."""
    return Data(args.glue, args.gtsrb, args.omniglot, args.elpv, args.vgg16, encoder_of(args.minilm))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {stage.__name__: stage for stage in STAGES}
    parser.add_argument("results", type=Path, help="folder of the results; existing ones are not computed again")
    parser.add_argument("--only", help=f"comma-separated list of {','.join(stages)}; default: all")
    parser.add_argument("--device", default="cpu", help="device to compute on; its kind chooses the regime")
    parser.add_argument("--regime", choices=REGIMES, help="sizes, epochs and precision; default: the device's")
    parser.add_argument("--compile", choices=("none", *COMPILE_MODES), help="compile mode; default: the regime's")
    parser.add_argument("--budget", type=float, help="seconds after which no training run is begun")
    parser.add_argument("--processes", type=int, default=1, help="number of parallel processes")
    add_data(parser)
    parser.add_argument("--out", type=Path, help="CSV file of all results; default: evidence-REGIME.csv")
    args = parser.parse_args()
    selected = list(stages) if args.only is None else args.only.split(",")
    if unknown := [name for name in selected if name not in stages]:
        parser.error(f"no stage {unknown[0]!r}{nearest(unknown[0], stages)}")
    kind = args.device.partition(":")[0]
    if args.regime is None and kind not in REGIMES:
        parser.error(f"no regime for device {args.device!r}: name one with --regime")
    regime = REGIMES[args.regime or kind]
    if args.compile is not None:
        regime = replace(regime, compile=None if args.compile == "none" else args.compile)
    out = RESULTS / f"evidence-{regime.name}.csv" if args.out is None else args.out
    args.results.mkdir(parents=True, exist_ok=True)
    if out.is_file():
        # published results are not computed again
        shutil.copyfile(out, args.results / "published.csv")
    deadline = None if args.budget is None else time.time() + args.budget
    data = data_of(args)
    lab = Lab(args.results, out, args.processes, args.device, regime, deadline)
    try:
        lab.run(planned((stages[name] for name in selected), data, regime))
    except Over as over:
        print(f"ended by {over}: runs in progress are abandoned, and the same command resumes", flush=True)
        if str(over) == "SIGTERM":
            sys.exit(143)
    if lab.failed:
        sys.exit(f"{len(lab.failed)} runs failed, the first: {lab.failed[0]}")


if __name__ == "__main__":
    main()
