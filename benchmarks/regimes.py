"""What the evidence is measured with: sizes, epochs and precision by regime, and data by option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from visadapt.experiments import Contender, Problem, problem
from visadapt.experiments.fair import fair_contender


@dataclass(frozen=True)
class Regime:
    """Sizes, epochs and precision; results of two regimes are never in one report.

    Attributes:
        name: name that the results carry.
        texts: training texts per problem, or all where there are fewer.
        images: training images per problem, or all where there are fewer.
        validation: validation samples per problem.
        test: test samples per problem, or all where there are fewer.
        side: side of images in pixels.
        text_epochs: numbers of epochs to choose from.
        image_epochs: numbers of epochs to choose from.
        text_batch: texts per step.
        image_batch: images per step.
        seed_count: number of seeds.
        compile: compile mode of the training steps; see `visadapt.training.Recipe`.
        whole: text sets of which all training texts are used.
        first: numbers of problems that the first three contenders are compared on before anything else, in turn.
    """

    name: str
    texts: int
    images: int
    validation: int
    test: int
    side: int
    text_epochs: tuple[int, ...]
    image_epochs: tuple[int, ...]
    text_batch: int = 16
    image_batch: int = 32
    seed_count: int = 5
    compile: str | None = None
    whole: tuple[str, ...] = ()
    first: tuple[int, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds."""
        return tuple(range(self.seed_count))

    def contenders(self, names: Sequence[str], problem: Problem) -> tuple[Contender, ...]:
        """Build contenders whose rate, epochs and activation are chosen on validation data of their own problem."""
        return tuple(self.contender(name, problem) for name in names)

    def contender(self, name: str, problem: Problem) -> Contender:
        """Build a contender whose rate, epochs and activation are chosen on validation data, in bf16 autocast."""
        texts = problem.modality == "text"
        lengths = self.text_epochs if texts else self.image_epochs
        batch_size = self.text_batch if texts else self.image_batch
        chosen = fair_contender(name, problem.modality, lengths, fast=True, batch_size=batch_size)
        return chosen.with_recipe(compile=self.compile)

    def settled(self, name: str, problem: Problem) -> Contender:
        """Build a contender without choices, for experiments that vary something else: the catalogue's rate, and the
        middle number of epochs."""
        chosen = self.contender(name, problem)
        lengths = chosen.lengths or (chosen.recipe.epochs,)
        middle = chosen.with_recipe(epochs=lengths[len(lengths) // 2])
        return replace(middle, rates=(), lengths=(), variants=(), extend=False)


REGIMES = {
    # what these take is printed by `python -m benchmarks.estimate`, given all data; see there how it is estimated
    # two cores, in the background of other work: about 10 hours for what comes first
    "cpu": Regime("cpu", 2000, 2000, 400, 1000, 64, (3, 9), (5,), seed_count=3, first=(2, 3, 4, 6)),
    # one GPU and many processes: what the budget allows, seed by seed of the first stage, then the other stages
    "cuda": Regime(
        "cuda", 2000, 2000, 500, 1500, 64, (3, 9, 20), (5, 9), text_batch=32, compile="graphs", whole=("cola",)
    ),
    # a moment, to test the command; no evidence
    "smoke": Regime("smoke", 48, 48, 20, 24, 16, (1, 2), (1, 2), seed_count=2),
}


@dataclass(frozen=True)
class Data:
    """Data and weights that are not bundled; problems on missing ones are left out.

    Attributes:
        glue: folder of the GLUE and TREC sets.
        gtsrb: zip file of the traffic signs.
        omniglot: zip file of the characters.
        elpv: zip file of the solar cells.
        vgg16: file of VGG-16's convolutions.
        encoder: name of the backbone for texts; None to leave texts out.
    """

    glue: Path | None = None
    gtsrb: Path | None = None
    omniglot: Path | None = None
    elpv: Path | None = None
    vgg16: Path | None = None
    encoder: str | None = "bundled/minilm"

    def images(self, regime: Regime, network: str = "bundled/resnet50", **options: object) -> tuple[Problem, ...]:
        """Return problems on photographs, signs, clothes, digits, characters and solar cells."""
        mirrored: dict[str, bool] = {"cifar10": True, "fashion-mnist": True, "mnist": False}
        mirrored |= {} if self.gtsrb is None else {str(self.gtsrb): False}
        mirrored |= {} if self.omniglot is None else {str(self.omniglot): False}
        mirrored |= {} if self.elpv is None else {str(self.elpv): True}
        sizes = {"train": regime.images, "validation": regime.validation, "test": regime.test, "size": regime.side}
        # left and right differ in digits, signs and characters
        return tuple(
            problem(network, name, **sizes, **options, augment="shift and mirror" if mirror else "shift")
            for name, mirror in mirrored.items()
        )

    def texts(self, regime: Regime) -> tuple[Problem, ...]:
        """Return problems on questions, sentiment and grammar, then longer texts, then pairs of texts."""
        if self.encoder is None:
            return ()
        encoder, glue = self.encoder, None if self.glue is None else str(self.glue)
        names = ["tweets", "products", "movies", "editorials"]
        if glue is not None:
            names = ["trec", "tweets", "sst2", "products", "cola", "mrpc", "movies", "editorials", "rte"]
        lengths = {"mrpc": 64, "rte": 64}
        sizes = {"validation": regime.validation, "test": regime.test}
        return tuple(
            problem(
                encoder,
                name,
                train=None if name in regime.whole else regime.texts,
                root=glue,
                length=lengths.get(name, 32),
                **sizes,
            )
            for name in names
        )
