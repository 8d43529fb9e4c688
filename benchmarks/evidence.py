"""Re-runs the papers' claims on real images and texts; killed, it goes on where it was.

python -m benchmarks.evidence results --out bundled.csv                  # on the bundled data
python -m benchmarks.evidence results --glue FOLDER --gtsrb FILE.zip --vgg16 FILE.safetensors --processes 2
visadapt report benchmarks/results/evidence.csv --out docs/results

The folder of --glue holds sst2, cola, mrpc, rte and trec as they are distributed, --gtsrb is a zip file of a folder of
images, --vgg16 has the convolutions of VGG-16; what is not given is left out. Without --glue other rates are chosen,
which a report does not mix with those of what is published. Stages are made in the order of STAGES.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

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
IMAGE_EPOCHS, TEXT_EPOCHS = 1, 3
# 500 texts, three times over, are 375 steps of 4 and 48 of the catalogue's 32, which are too few: see `steps`
TEXT_BATCH = 4
# one rate of each method for all problems of a modality: the best in the mean over these
SWEPT = ("sst2", "movies", "cifar10")

IMAGE = ("linear probe", "norms only", "bottleneck m=8", "bottleneck m=32", "bottleneck m=8 activation=None",
         "parallel rank=0.125", "full fine-tuning")  # fmt: skip
TEXT = ("linear probe", "norms only", "bottleneck m=8", "bottleneck m=64", "lora r=8", "full fine-tuning")
MORE_IMAGE = ("biases", "bottleneck m=64", "series", "dan", "convadapter", "lora r=8", "top layers n=2")
# it has no norms
VGG = tuple(name for name in (*IMAGE, *MORE_IMAGE) if name != "norms only")
MORE_TEXT = ("biases", "bottleneck m=32", "adaptformer m=64 scale=1", "top layers n=2")


@dataclass(frozen=True)
class Data:
    """What there is beside the bundled sets.

    Attributes:
        glue: folder.
        gtsrb: zip file.
        vgg16: weights.
    """

    glue: Path | None = None
    gtsrb: Path | None = None
    vgg16: Path | None = None

    def images(self, network: str = "bundled/resnet50", size: int = 48) -> tuple[Problem, ...]:
        """Photographs, clothes, traffic signs and digits."""
        names = ("cifar10", "fashion-mnist", *(() if self.gtsrb is None else (str(self.gtsrb),)), "mnist")
        return tuple(problem(network, name, train=2000, validation=300, test=1000, size=size) for name in names)

    def of_vgg(self) -> tuple[Problem, ...]:
        """Photographs and clothes, smaller; none without its weights."""
        return () if self.vgg16 is None else self.images(str(self.vgg16), size=32)[:2]

    def texts(self) -> tuple[Problem, ...]:
        """Sentiment, grammar and questions, then longer texts, then pairs."""
        given = None if self.glue is None else str(self.glue)
        names = ["tweets", "products", "movies", "editorials"]
        if given is not None:
            names = ["sst2", "tweets", "cola", "trec", "products", "movies", "editorials", "mrpc", "rte"]
        lengths = {"mrpc": 64, "rte": 64}
        return tuple(
            problem(
                "bundled/minilm", name, train=500, validation=300, test=1000, root=given, length=lengths.get(name, 32)
            )
            for name in names
        )


def entrants(names: Iterable[str], at: Problem) -> tuple[Contender, ...]:
    """Contenders of the catalogue, on texts in smaller batches than its own.

    `init_scale`, `ablation` and `tradeoff` keep the catalogue's.
    """
    if at.modality == "image":
        return tuple(contender(name, IMAGE_EPOCHS) for name in names)
    return tuple(contender(name, TEXT_EPOCHS).with_recipe(batch_size=TEXT_BATCH) for name in names)


Stage = Callable[[Data, "Lab"], None]


@dataclass(frozen=True)
class Lab:
    """Where experiments are run.

    Attributes:
        folder: of the results.
        processes: that work at once.
        device: that is computed on.
    """

    folder: Path
    processes: int
    device: str

    def run(self, experiment: Experiment) -> list[Result]:
        """Makes what is missing, and gives all results."""
        return run_experiment(experiment, self.folder, processes=self.processes, device=self.device)

    def tuned(self, names: Iterable[str], problems: tuple[Problem, ...]) -> tuple[Contender, ...]:
        """Contenders, each at the learning rate that is best on the validation data of those problems in SWEPT."""
        at = tuple(problem for problem in problems if problem.name in SWEPT)
        made = entrants(names, problems[0])
        results = self.run(Compare(at, made, SEEDS[:1], "validation", _small(made)))
        found = []
        for who in made:
            scores = {
                rate: sum(result.standing for result in results if (result.contender, result.lr) == (who.name, rate))
                for rate in who.rates
            }
            found.append(replace(who.with_recipe(lr=max(scores, key=lambda rate: (scores[rate], -rate))), rates=()))
        return tuple(found)

    def compare(self, at: Problem, who: tuple[Contender, ...]) -> None:
        """On validation data, to choose by, and on test data: trained once for both, but for full fine-tuning."""
        small = _small(who)
        self.run(Compare((at,), tuple(one for one in who if one.name in small), SEEDS, "validation", small))
        self.run(Compare((at,), who, SEEDS, "test", small))


def _small(who: Iterable[Contender]) -> tuple[str, ...]:
    """Names of those whose task files are kept."""
    return tuple(one.name for one in who if not one.name.startswith("full fine-tuning"))


def compare_first(data: Data, lab: Lab) -> None:
    compare(data, lab, 1)


def compare(data: Data, lab: Lab, most: int | None = None) -> None:
    texts, images = data.texts(), data.images()
    of_text, of_images = lab.tuned(TEXT, texts), lab.tuned(IMAGE, images)
    # in turns, so that a run that is cut short has some of both
    for text, image in zip_longest(texts[:most], images[:most]):
        lab.compare(text, of_text)
        if image is not None:
            lab.compare(image, of_images)


def steps(data: Data, lab: Lab) -> None:
    """What four times the batch leaves, which is a quarter of the steps; and what three times the epochs add."""
    texts, fewer = data.texts(), ("a quarter of the steps", {"batch_size": 4 * TEXT_BATCH})
    # each method on the first text, with a sweep of its own; two of them on all the others
    lab.compare(texts[0], _varied(entrants((*TEXT[1:], *MORE_TEXT), texts[0]), *fewer))
    two = _varied(lab.tuned(("bottleneck m=64", "full fine-tuning"), texts), *fewer)
    for text in texts[1:]:
        lab.compare(text, two)
    longer = _longer(lab, texts)
    for text in texts:
        lab.compare(text, longer)


def _longer(lab: Lab, texts: tuple[Problem, ...]) -> tuple[Contender, ...]:
    """The adapter that validation data prefers on texts, and full fine-tuning, with three times the epochs."""
    who = lab.tuned(("lora r=8", "full fine-tuning"), texts)
    return _varied(who, "three times the epochs", {"epochs": 3 * TEXT_EPOCHS})


def _varied(who: Iterable[Contender], said: str, changes: dict[str, int]) -> tuple[Contender, ...]:
    """The same with another recipe, which their names tell."""
    return tuple(replace(one.with_recipe(**changes), name=f"{one.name}, {said}") for one in who)


def vgg(data: Data, lab: Lab) -> None:
    for image in data.of_vgg():
        lab.compare(image, entrants(VGG, image))


def more_methods(data: Data, lab: Lab) -> None:
    for problems, names in ((data.texts(), MORE_TEXT), (data.images(), MORE_IMAGE)):
        who = lab.tuned(names, problems)
        for at in problems:
            lab.compare(at, who)


def init_scale(data: Data, lab: Lab) -> None:
    lab.run(InitScale(data.texts()[:1], contender("bottleneck m=64", TEXT_EPOCHS), seeds=SEEDS[:2]))
    lab.run(InitScale(data.images()[:1], contender("bottleneck m=8", IMAGE_EPOCHS), seeds=SEEDS[:1]))


def ablation(data: Data, lab: Lab) -> None:
    lab.run(Ablation(data.texts()[:2], (contender("bottleneck m=64", TEXT_EPOCHS),)))
    lab.run(Ablation(data.images()[:1], (contender("bottleneck m=8", IMAGE_EPOCHS),)))


def tradeoff(data: Data, lab: Lab) -> None:
    # one rate for all widths: what is flat over them is then not what tuning made so
    settled, some = ("bottleneck",), (1, 4, 8, 16, 64, 256)
    lab.run(Tradeoff(data.texts()[:1], widths=some, epochs=TEXT_EPOCHS, settled=settled))
    lab.run(Tradeoff(data.images()[:1], widths=(2, 8, 32, 128, 256), epochs=IMAGE_EPOCHS, settled=settled))


def sequence(data: Data, lab: Lab) -> None:
    for problems in (data.texts(), data.images()):
        who, full = lab.tuned(("bottleneck m=8", "full fine-tuning"), problems)
        lab.run(Sequence(problems[:5], (who,), full))


def transfer(data: Data, lab: Lab) -> None:
    for problems in (data.texts(), data.images()):
        lab.run(Transfer(problems[:5], *lab.tuned(("bottleneck m=8",), problems), SEEDS[:1]))


def modality(data: Data, lab: Lab) -> None:
    """One adapter of each kind at parts of the depth; and all that was compared, on one axis."""
    texts, image_names, text_names = data.texts(), (*IMAGE, *MORE_IMAGE), (*TEXT, *MORE_TEXT)
    for problems, names, more in ((data.images(), image_names, ()), (texts, text_names, _longer(lab, texts))):
        who = lab.tuned(names, problems)
        lab.run(Modality(problems[:1], (), who[names.index("bottleneck m=8")], SEEDS[:1]))
        for at in problems:
            lab.run(Modality((at,), (*who, *more), None, SEEDS))
    for image in data.of_vgg():
        lab.run(Modality((image,), entrants(VGG, image), None, SEEDS))


# what the papers claim of one problem first, then the same methods on more of them
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
    parser.add_argument("results", type=Path, help="folder of the results; those that are there are not made again")
    parser.add_argument("--only", help=f"some of {','.join(stages)}, separated by commas")
    parser.add_argument("--glue", type=Path)
    parser.add_argument("--gtsrb", type=Path)
    parser.add_argument("--vgg16", type=Path)
    parser.add_argument("--processes", type=int, default=1, help="how many work at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=PUBLISHED, help="CSV file of all results")
    asked = parser.parse_args()
    wanted = list(stages) if asked.only is None else asked.only.split(",")
    if unknown := [name for name in wanted if name not in stages]:
        parser.error(f"no stage {unknown[0]!r}: there are {', '.join(stages)}")
    asked.results.mkdir(parents=True, exist_ok=True)
    if asked.out.is_file():
        # what an earlier run published need not be made again
        shutil.copyfile(asked.out, asked.results / "published.csv")
    data, lab = Data(asked.glue, asked.gtsrb, asked.vgg16), Lab(asked.results, asked.processes, asked.device)
    for name in wanted:
        print(f"{name}:", flush=True)
        try:
            stages[name](data, lab)
        finally:
            write_csv(read_results(asked.results), asked.out)


if __name__ == "__main__":
    main()
