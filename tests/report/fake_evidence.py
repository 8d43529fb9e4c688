"""The evidence as its stages would write it, with invented scores: nothing is trained."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection
from pathlib import Path

from benchmarks.evidence import STAGES
from benchmarks.regimes import REGIMES, Data
from visadapt.experiments import Experiment, Result
from visadapt.experiments.ablation import Removal
from visadapt.experiments.catalogue import FULL
from visadapt.experiments.decathlon import Score
from visadapt.experiments.init_scale import InitScale
from visadapt.experiments.run import Run, TrainingRun
from visadapt.experiments.sequence import Chain

SIZES = {"resnet50": 23_508_032, "minilm": 22_713_216, "vgg16": 14_714_688}

POINTS = {"linear probe": -6.0, "norms only": -2.0, "biases": -3.0, "lora": -0.8, "bottleneck m=8": -0.5}


def fake_evidence(
    folder: Path, regime: str = "cuda", most: int = 1_000_000, only: Collection[str] = (), seeds: int = 3
) -> list[Result]:
    """Invent the results of all stages, or of the first ``most`` results of these.

    Args:
        folder: an empty folder.
        regime: name of the regime.
        most: number of results after which the budget is spent.
        only: names of stages; none for all.
        seeds: number of seeds.
    """
    files = [folder / name for name in ("gtsrb64.zip", "omniglot64.zip", "elpv96.zip", "vgg16.safetensors")]
    for file in files:
        file.touch()
    made: dict[tuple[str, str], Result] = {}
    # one length each: what is chosen is not what is tested here
    plan = dataclasses.replace(REGIMES[regime], seed_count=seeds, text_epochs=(3,), image_epochs=(5,))
    for stage in STAGES:
        for experiment in stage(Data(folder / "glue", *files), plan) if not only or stage.__name__ in only else ():
            _invent(experiment, regime, made, most)
    return list(made.values())


def _invent(experiment: Experiment, regime: str, made: dict[tuple[str, str], Result], most: int) -> None:
    def lookup(key: str) -> Result | None:
        return made.get((experiment.name, key))

    while True:
        missing = [run for run in experiment.runs(lookup) if any(lookup(key) is None for key in run.keys)]
        if not missing or len(made) >= most:
            return
        for run in missing:
            for result in invented(run, experiment, regime):
                if len(made) < most:
                    made.setdefault((result.experiment, result.key), result)


def invented(run: Run, experiment: Experiment, regime: str) -> list[Result]:
    """Invent the results of a run."""
    if isinstance(run, Score):
        return [dataclasses.replace(result, regime=regime) for result in run.results(run.keys, None)]
    if isinstance(run, Removal):
        return [
            _result(run.training, key, regime, "validation", -_lost(span, run.layer_count), {
                "first": span and span[0], "last": span and span[1], "norms": norms, "layers": run.layer_count,
                "majority": 0.1,
            })
            for key, (norms, span) in run._cases().items()
        ]  # fmt: skip
    if isinstance(run, Chain):
        return _chain(run, regime)
    assert isinstance(run, TrainingRun)
    lost = 0.0
    if isinstance(experiment, InitScale) and run.facts["std"] > 0.05:
        lost = -60.0
    splits = ("validation", "test") if len(run.keys) == 2 else (run.split,)
    return [_result(run, key, regime, split, lost, run.facts) for key, split in zip(run.keys, splits, strict=True)]


def _lost(span: tuple[int, int] | None, layers: int) -> float:
    """Upper layers cost more than lower ones."""
    return 0.0 if span is None else sum(60.0 * 1.6 ** (layer - layers) for layer in range(span[0], span[1] + 1))


def _chain(run: Chain, regime: str) -> list[Result]:
    results = []
    for last, after in enumerate(run.problems):
        for index, problem in enumerate(run.problems[: last + 1]):
            training = TrainingRun("sequence", problem, run.contender, run.seed)
            total = 1.002 if run.shared else 1.013 + 0.013 * last
            outputs = f"{run.contender.name}{run.seed}{problem.name}{last if run.shared else 0}"
            facts = {"position": last, "after": after.name, "total": total, "outputs": outputs}
            lost = -12.0 * (last - index) * run.shared
            # nothing else changes the score: noise is that of the problem and the seed
            result = _result(training, training.key, regime, "test", lost, facts)
            results.append(dataclasses.replace(result, key=run._key(last, index)))
    return results


def noise(*words: object) -> float:
    """Return a number around 0 of about the size 1 that depends on the words only."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return sum(digest[:12]) / 12 / 255 * 6 - 3


def _result(run: TrainingRun, key: str, regime: str, split: str, lost: float, facts: dict[str, object]) -> Result:
    problem, name = run.problem, run.contender.name
    base = 78 + 10 * noise(problem.name, problem.backbone)
    gap = next((points for start, points in POINTS.items() if name.startswith(start)), 0.0 if name == FULL else -0.3)
    if name == "linear probe" and problem.name == "cola":
        gap = -55.0
    rate = -abs(math.log10(run.contender.recipe.lr / 1e-3)) * 2 * (name != FULL)
    own = 1.0 * noise(problem.name, name) * (name != FULL)
    score = base + gap + own + rate + lost + 0.6 * noise(problem.name, run.seed, split) + 0.4 * noise(key)
    backbone = SIZES.get(problem.backbone, 5_000_000)
    fraction = 1.0 if name == FULL else 0.0 if name == "linear probe" else 0.01 + 0.02 * abs(noise(name)) / 3
    return Result(
        key=key, experiment=run.experiment, modality=problem.modality, network=problem.backbone, problem=problem.name,
        contender=name, seed=run.seed, split=split, metric=problem.metric, score=min(99.0, max(1.0, score)) / 100,
        trained=round(fraction * backbone), head=20_490, backbone=backbone, seconds=3.0,
        bytes=round(4 * fraction * backbone) + 80_000, lr=run.contender.recipe.lr,
        epochs=run.contender.recipe.epochs, facts=dict(facts),
        machine={"device": "cuda NVIDIA H100 80GB HBM3", "python": "3.11", "torch": "2.14.1", "commit": "abc1234"},
        setting=run.setting, regime=regime,
    )  # fmt: skip
