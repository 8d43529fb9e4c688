"""Test the papers' claims on real images and texts; an interrupted run resumes.

python -m benchmarks.evidence results --out bundled.csv                  # on the bundled data
python -m benchmarks.evidence results --glue FOLDER --gtsrb FILE.zip --vgg16 FILE.safetensors --processes 2
visadapt report benchmarks/results/evidence.csv --out docs/results

The folder of --glue contains sst2, cola, mrpc, rte and trec as they are distributed, --gtsrb is a zip file of a folder
of images, --vgg16 contains the convolutions of VGG-16; experiments on missing data are left out. Without --glue other
learning rates are chosen, and a report refuses to mix them with the published results.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from visadapt.errors import nearest
from visadapt.experiments import (
    Ablation,
    Compare,
    Contender,
    Experiment,
    InitScale,
    Modality,
    Problem,
    Result,
    Sequence,
    Tradeoff,
    Transfer,
    contender,
    problem,
    read_results,
    run_experiment,
    write_csv,
)

PUBLISHED = Path(__file__).parent / "results" / "evidence.csv"
SEEDS = (0, 1, 2)
HEAD_FIRST = False
"""The published results are of heads that started from random values; True computes all of them anew."""

IMAGE_EPOCHS, TEXT_EPOCHS = 1, 3
# 3 epochs of 500 texts are 375 steps in batches of 4, but only 48 in the catalogue's batches of 32: see `steps`
TEXT_BATCH = 4
# each method has one learning rate for all problems of a modality: the best on average over these problems
SWEPT = ("sst2", "movies", "cifar10")

IMAGE = ("linear probe", "norms only", "bottleneck m=8", "bottleneck m=32", "bottleneck m=8 activation=None",
         "parallel rank=0.125", "full fine-tuning")  # fmt: skip
TEXT = ("linear probe", "norms only", "bottleneck m=8", "bottleneck m=64", "lora r=8", "full fine-tuning")
MORE_IMAGE = ("biases", "bottleneck m=64", "series", "dan", "convadapter", "lora r=8", "top layers n=2")
# VGG-16 has no norms
VGG = tuple(name for name in (*IMAGE, *MORE_IMAGE) if name != "norms only")
MORE_TEXT = ("biases", "bottleneck m=32", "adaptformer m=64 scale=1", "top layers n=2")


@dataclass(frozen=True)
class Data:
    """Data and weights that are not bundled.

    Attributes:
        glue: folder of the GLUE and TREC sets.
        gtsrb: zip file of the traffic signs.
        vgg16: file of VGG-16's convolutions.
    """

    glue: Path | None = None
    gtsrb: Path | None = None
    vgg16: Path | None = None

    def images(self, network: str = "bundled/resnet50", size: int = 48) -> tuple[Problem, ...]:
        """Return problems on photographs, clothes, traffic signs and digits."""
        names = ("cifar10", "fashion-mnist", *(() if self.gtsrb is None else (str(self.gtsrb),)), "mnist")
        return tuple(problem(network, name, train=2000, validation=300, test=1000, size=size) for name in names)

    def images_for_vgg(self) -> tuple[Problem, ...]:
        """Return problems for VGG-16 on smaller photographs and clothes; none without its weights."""
        return () if self.vgg16 is None else self.images(str(self.vgg16), size=32)[:2]

    def texts(self) -> tuple[Problem, ...]:
        """Return problems on sentiment, grammar and questions, then longer texts, then pairs of texts."""
        glue = None if self.glue is None else str(self.glue)
        names = ["tweets", "products", "movies", "editorials"]
        if glue is not None:
            names = ["sst2", "tweets", "cola", "trec", "products", "movies", "editorials", "mrpc", "rte"]
        lengths = {"mrpc": 64, "rte": 64}
        return tuple(
            problem(
                "bundled/minilm", name, train=500, validation=300, test=1000, root=glue, length=lengths.get(name, 32)
            )
            for name in names
        )


def contenders(names: Iterable[str], problem: Problem) -> tuple[Contender, ...]:
    """Return contenders of the catalogue, for texts with smaller batches.

    `init_scale`, `ablation` and `tradeoff` use the catalogue's batches.
    """
    if problem.modality == "image":
        return tuple(contender(name, IMAGE_EPOCHS, HEAD_FIRST) for name in names)
    return tuple(contender(name, TEXT_EPOCHS, HEAD_FIRST).with_recipe(batch_size=TEXT_BATCH) for name in names)


Stage = Callable[[Data, "Lab"], None]


@dataclass(frozen=True)
class Lab:
    """The folder, processes and device that experiments run with.

    Attributes:
        folder: folder of the results.
        processes: number of parallel processes.
        device: device to compute on.
    """

    folder: Path
    processes: int
    device: str

    def run(self, experiment: Experiment) -> list[Result]:
        """Compute the missing results of an experiment, and return all of them."""
        return run_experiment(experiment, self.folder, processes=self.processes, device=self.device)

    def tuned(self, names: Iterable[str], problems: tuple[Problem, ...]) -> tuple[Contender, ...]:
        """Return contenders with the learning rate that is best on validation data of the problems in SWEPT."""
        swept = tuple(problem for problem in problems if problem.name in SWEPT)
        rated = contenders(names, problems[0])
        results = self.run(Compare(swept, rated, SEEDS[:1], "validation", _kept(rated)))
        tuned = []
        for each in rated:
            scores = {
                rate: sum(result.standing for result in results if (result.contender, result.lr) == (each.name, rate))
                for rate in each.rates
            }
            best = max(scores, key=lambda rate: (scores[rate], -rate))
            tuned.append(replace(each.with_recipe(lr=best), rates=()))
        return tuple(tuned)

    def compare(self, problem: Problem, compared: tuple[Contender, ...]) -> None:
        """Compare on validation data, then on test data; except for full fine-tuning, one training run serves both."""
        kept = _kept(compared)
        self.run(Compare((problem,), tuple(each for each in compared if each.name in kept), SEEDS, "validation", kept))
        self.run(Compare((problem,), compared, SEEDS, "test", kept))


def _kept(compared: Iterable[Contender]) -> tuple[str, ...]:
    """Return the names of the contenders whose task files are kept: all but full fine-tuning, whose files are large."""
    return tuple(each.name for each in compared if not each.name.startswith("full fine-tuning"))


def compare_first(data: Data, lab: Lab) -> None:
    compare(data, lab, 1)


def compare(data: Data, lab: Lab, limit: int | None = None) -> None:
    texts, images = data.texts(), data.images()
    for_texts, for_images = lab.tuned(TEXT, texts), lab.tuned(IMAGE, images)
    # alternating, so that an interrupted run has some results of both
    for text, image in zip_longest(texts[:limit], images[:limit]):
        lab.compare(text, for_texts)
        if image is not None:
            lab.compare(image, for_images)


def steps(data: Data, lab: Lab) -> None:
    """Compare other numbers of steps: a quarter, by batches four times as large, and three times the epochs."""
    texts, fewer = data.texts(), ("a quarter of the steps", {"batch_size": 4 * TEXT_BATCH})
    # every method on the first problem, with its own sweep; two methods on all other problems
    lab.compare(texts[0], _varied(contenders((*TEXT[1:], *MORE_TEXT), texts[0]), *fewer))
    two = _varied(lab.tuned(("bottleneck m=64", "full fine-tuning"), texts), *fewer)
    for text in texts[1:]:
        lab.compare(text, two)
    longer = _longer(lab, texts)
    for text in texts:
        lab.compare(text, longer)


def _longer(lab: Lab, texts: tuple[Problem, ...]) -> tuple[Contender, ...]:
    """Return the best adapter on validation data of texts, and full fine-tuning, with three times the epochs."""
    best = lab.tuned(("lora r=8", "full fine-tuning"), texts)
    return _varied(best, "three times the epochs", {"epochs": 3 * TEXT_EPOCHS})


def _varied(originals: Iterable[Contender], suffix: str, changes: dict[str, int]) -> tuple[Contender, ...]:
    """Return contenders with changed recipes, and a suffix to their names."""
    return tuple(replace(each.with_recipe(**changes), name=f"{each.name}, {suffix}") for each in originals)


def vgg(data: Data, lab: Lab) -> None:
    for image in data.images_for_vgg():
        lab.compare(image, contenders(VGG, image))


def more_methods(data: Data, lab: Lab) -> None:
    for problems, names in ((data.texts(), MORE_TEXT), (data.images(), MORE_IMAGE)):
        tuned = lab.tuned(names, problems)
        for each in problems:
            lab.compare(each, tuned)


def init_scale(data: Data, lab: Lab) -> None:
    lab.run(InitScale(data.texts()[:1], contender("bottleneck m=64", TEXT_EPOCHS, HEAD_FIRST), seeds=SEEDS[:2]))
    lab.run(InitScale(data.images()[:1], contender("bottleneck m=8", IMAGE_EPOCHS, HEAD_FIRST), seeds=SEEDS[:1]))


def ablation(data: Data, lab: Lab) -> None:
    lab.run(Ablation(data.texts()[:2], (contender("bottleneck m=64", TEXT_EPOCHS, HEAD_FIRST),)))
    lab.run(Ablation(data.images()[:1], (contender("bottleneck m=8", IMAGE_EPOCHS, HEAD_FIRST),)))


def tradeoff(data: Data, lab: Lab) -> None:
    # one learning rate for all widths, so that tuning does not hide the effect of the width
    settled, text_widths, image_widths = ("bottleneck",), (1, 4, 8, 16, 64, 256), (2, 8, 32, 128, 256)
    lab.run(Tradeoff(data.texts()[:1], widths=text_widths, epochs=TEXT_EPOCHS, settled=settled, head_first=HEAD_FIRST))
    lab.run(
        Tradeoff(data.images()[:1], widths=image_widths, epochs=IMAGE_EPOCHS, settled=settled, head_first=HEAD_FIRST)
    )


def sequence(data: Data, lab: Lab) -> None:
    for problems in (data.texts(), data.images()):
        bottleneck, full = lab.tuned(("bottleneck m=8", "full fine-tuning"), problems)
        lab.run(Sequence(problems[:5], (bottleneck,), full))


def transfer(data: Data, lab: Lab) -> None:
    for problems in (data.texts(), data.images()):
        lab.run(Transfer(problems[:5], *lab.tuned(("bottleneck m=8",), problems), SEEDS[:1]))


def modality(data: Data, lab: Lab) -> None:
    """Compare a bottleneck in some of the layers only; and everything that was compared, on one axis."""
    texts, image_names, text_names = data.texts(), (*IMAGE, *MORE_IMAGE), (*TEXT, *MORE_TEXT)
    for problems, names, more in ((data.images(), image_names, ()), (texts, text_names, _longer(lab, texts))):
        tuned = lab.tuned(names, problems)
        lab.run(Modality(problems[:1], (), tuned[names.index("bottleneck m=8")], SEEDS[:1]))
        for each in problems:
            lab.run(Modality((each,), (*tuned, *more), None, SEEDS))
    for image in data.images_for_vgg():
        lab.run(Modality((image,), contenders(VGG, image), None, SEEDS))


# in this order: first every claim on one problem, then the same methods on more problems
STAGES: tuple[Stage, ...] = (
    compare_first,
    init_scale,
    ablation,
    tradeoff,
    compare,
    steps,
    vgg,
    more_methods,
    modality,
    sequence,
    transfer,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {stage.__name__: stage for stage in STAGES}
    parser.add_argument("results", type=Path, help="folder of the results; existing ones are not computed again")
    parser.add_argument("--only", help=f"comma-separated list of {','.join(stages)}; default: all")
    parser.add_argument("--glue", type=Path, help="folder of sst2, cola, mrpc, rte and trec")
    parser.add_argument("--gtsrb", type=Path, help="zip file of a folder of traffic signs")
    parser.add_argument("--vgg16", type=Path, help="safetensors file of VGG-16's convolutions")
    parser.add_argument("--processes", type=int, default=1, help="number of parallel processes")
    parser.add_argument("--device", default="cpu", help="device to compute on")
    parser.add_argument("--out", type=Path, default=PUBLISHED, help="CSV file of all results")
    args = parser.parse_args()
    selected = list(stages) if args.only is None else args.only.split(",")
    if unknown := [name for name in selected if name not in stages]:
        parser.error(f"no stage {unknown[0]!r}{nearest(unknown[0], stages)}")
    args.results.mkdir(parents=True, exist_ok=True)
    if args.out.is_file():
        # published results are not computed again
        shutil.copyfile(args.out, args.results / "published.csv")
    data, lab = Data(args.glue, args.gtsrb, args.vgg16), Lab(args.results, args.processes, args.device)
    for name in selected:
        print(f"{name}:", flush=True)
        try:
            stages[name](data, lab)
        finally:
            write_csv(read_results(args.results), args.out)


if __name__ == "__main__":
    main()
