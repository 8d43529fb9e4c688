"""Test the papers' claims on real images and texts; an interrupted run resumes.

python -m benchmarks.evidence results --device cpu                       # in the background: days, resumable
python -m benchmarks.evidence results --device cuda --budget 480 --processes 8
python -m benchmarks.evidence results --glue FOLDER --gtsrb FILE.zip --omniglot FILE.zip --elpv FILE.zip \
    --vgg16 FILE.safetensors
visadapt report benchmarks/results/evidence-cpu.csv --out docs/results

The folder of --glue contains sst2, cola, mrpc, rte and trec as they are distributed; --gtsrb, --omniglot and --elpv are
zip files of folders of images; --vgg16 contains the convolutions of VGG-16. Problems on missing data are left out.

The device chooses the regime: sizes, epochs and precision (see benchmarks/regimes.py). Results carry its name, and a
report refuses those of two regimes. Stages run in order of priority; the first answers whether small adapters reach
full fine-tuning, one seed after another on all problems, so that whatever is done when the budget ends is balanced.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.regimes import REGIMES, Data, Lab
from visadapt.errors import nearest
from visadapt.experiments import (
    Ablation,
    Compare,
    Crossmodal,
    InitScale,
    Modality,
    Problem,
    Sequence,
    Tradeoff,
    Transfer,
    read_results,
    write_csv,
)

RESULTS = Path(__file__).parent / "results"

FULL = "full fine-tuning"

BARS = {
    "image": (FULL, "linear probe", "bottleneck m=8", "convadapter", "bottleneck m=32"),
    "text": (FULL, "linear probe", "bottleneck m=8", "lora r=8", "bottleneck m=32"),
}
"""What decides whether a method with at most 3.6 % of the backbone reaches full fine-tuning."""

MORE = {
    "image": ("norms only", "lora r=8", "bottleneck m=8 activation=None", "bottleneck m=8 activation=gelu", "dora",
              "mona", "colora", "ladder", "bottleneck m=8 scale=channel drop_path=0.1"),
    "text": ("norms only", "bottleneck m=64", "dora", "ladder", "bottleneck m=8 scale=channel drop_path=0.1"),
}  # fmt: skip

Stage = Callable[[Data, Lab], None]


def alternating(data: Data, lab: Lab) -> list[Problem]:
    """Return texts and images in turn, so that an interrupted run has results of both."""
    pairs = zip_longest(data.texts(lab.regime), data.images(lab.regime))
    return [each for pair in pairs for each in pair if each is not None]


def compared(data: Data, lab: Lab, names: dict[str, tuple[str, ...]]) -> None:
    """Compare contenders on all problems, seed by seed.

    One process takes one problem after another; several share all problems of a modality.
    """
    problems = alternating(data, lab)
    groups = [[each] for each in problems]
    if lab.processes > 1:
        groups = [[each for each in problems if each.modality == modality] for modality in names]
    for count in range(1, len(lab.seeds) + 1):
        for group in groups:
            contenders = lab.contenders(names[group[0].modality], group[0])
            kept = tuple(each.name for each in contenders)
            lab.run(Compare(tuple(group), contenders, lab.seeds[:count], "both", kept))


def bars(data: Data, lab: Lab) -> None:
    compared(data, lab, BARS)


def transfer(data: Data, lab: Lab) -> None:
    """Start every problem from the adapters of every other one: the two transplant matrices."""
    for problems in (data.texts(lab.regime), data.images(lab.regime)):
        lab.run(Transfer(problems[:6], lab.regime.settled("bottleneck m=8", problems[0]), lab.seeds[:3]))


def sequence(data: Data, lab: Lab) -> None:
    for problems in (data.texts(lab.regime), data.images(lab.regime)):
        bottleneck, full = (lab.regime.settled(name, problems[0]) for name in ("bottleneck m=8", FULL))
        lab.run(Sequence(problems[:6], (bottleneck,), full, lab.seeds[:3]))


def modality(data: Data, lab: Lab) -> None:
    """Put a bottleneck into the first and into the last layers only."""
    for problems in (data.texts(lab.regime), data.images(lab.regime)):
        lab.run(Modality(problems[:2], (), lab.regime.settled("bottleneck m=8", problems[0]), lab.seeds[:3]))


def ablation(data: Data, lab: Lab) -> None:
    for problems in (data.texts(lab.regime), data.images(lab.regime)):
        settled = lab.regime.settled("bottleneck m=32", problems[0])
        lab.run(Ablation(problems[:2], (settled,), lab.seeds[:3]))


def init_scale(data: Data, lab: Lab) -> None:
    for problems in (data.texts(lab.regime), data.images(lab.regime)):
        lab.run(InitScale(problems[:2], lab.regime.settled("bottleneck m=32", problems[0]), seeds=lab.seeds[:3]))


def tradeoff(data: Data, lab: Lab) -> None:
    for problems, widths in ((data.texts(lab.regime), (1, 8, 64, 256)), (data.images(lab.regime), (2, 8, 32, 128))):
        epochs = lab.regime.settled(FULL, problems[0]).recipe.epochs
        lab.run(Tradeoff(problems[:2], widths=widths, seeds=lab.seeds[:3], epochs=epochs))


def crossmodal(data: Data, lab: Lab) -> None:
    """Put the same bottleneck into backbones of several families, at about the same fraction of each.

    Those with bundled weights come first. There is no pretrained text encoder of twelve layers to be had offline.
    """
    networks: dict[str, dict[str, Any]] = {"bundled/resnet50": {}}
    if data.vgg16 is not None:
        networks[str(data.vgg16)] = {}
    networks |= {name: {"options": (("pretrained", False),)} for name in RANDOM}
    problems = [data.texts(lab.regime)[0]]
    problems += [data.images(lab.regime, network, **options)[0] for network, options in networks.items()]
    groups = []
    for each in problems:
        names = (FULL, "linear probe", f"bottleneck m={WIDTHS[each.backbone]}", *OTHERS.get(each.backbone, ()))
        groups.append(lab.contenders(names, each))
    lab.run(Crossmodal(tuple(problems), tuple(groups), lab.seeds[:3]))


RANDOM = ("timm/convnext_atto", "timm/vit_tiny_patch16_224")
"""Backbones with random weights."""

WIDTHS = {"minilm": 32, "resnet50": 8, "vgg16": 23, "convnext_atto": 10, "vit_tiny_patch16_224": 7}
"""Widths with which a bottleneck and its norms are about 1.35 % of the backbone."""

OTHERS = {"convnext_atto": ("colora",)}
"""Methods that are made for a family."""


def more_methods(data: Data, lab: Lab) -> None:
    compared(data, lab, MORE)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {stage.__name__: stage for stage in STAGES}
    parser.add_argument("results", type=Path, help="folder of the results; existing ones are not computed again")
    parser.add_argument("--only", help=f"comma-separated list of {','.join(stages)}; default: all")
    parser.add_argument("--device", default="cpu", help="device to compute on; its kind chooses the regime")
    parser.add_argument("--regime", choices=REGIMES, help="sizes, epochs and precision; default: the device's")
    parser.add_argument("--budget", type=float, help="seconds after which no training run is begun")
    parser.add_argument("--processes", type=int, default=1, help="number of parallel processes")
    parser.add_argument("--glue", type=Path, help="folder of sst2, cola, mrpc, rte and trec")
    parser.add_argument("--gtsrb", type=Path, help="zip file of a folder of traffic signs")
    parser.add_argument("--omniglot", type=Path, help="zip file of a folder of characters")
    parser.add_argument("--elpv", type=Path, help="zip file of a folder of solar cells")
    parser.add_argument("--vgg16", type=Path, help="safetensors file of VGG-16's convolutions")
    parser.add_argument("--out", type=Path, help="CSV file of all results; default: evidence-REGIME.csv")
    args = parser.parse_args()
    selected = list(stages) if args.only is None else args.only.split(",")
    if unknown := [name for name in selected if name not in stages]:
        parser.error(f"no stage {unknown[0]!r}{nearest(unknown[0], stages)}")
    kind = args.device.partition(":")[0]
    if args.regime is None and kind not in REGIMES:
        parser.error(f"no regime for device {args.device!r}: name one with --regime")
    regime = REGIMES[args.regime or kind]
    out = RESULTS / f"evidence-{regime.name}.csv" if args.out is None else args.out
    args.results.mkdir(parents=True, exist_ok=True)
    if out.is_file():
        # published results are not computed again
        shutil.copyfile(out, args.results / "published.csv")
    data = Data(args.glue, args.gtsrb, args.omniglot, args.elpv, args.vgg16)
    deadline = None if args.budget is None else time.time() + args.budget
    lab = Lab(args.results, args.processes, args.device, regime, deadline)
    for name in selected:
        print(f"{name}:", flush=True)
        try:
            stages[name](data, lab)
        finally:
            write_csv([result for result in read_results(args.results) if result.regime == regime.name], out)


if __name__ == "__main__":
    main()
