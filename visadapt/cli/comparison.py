"""What a comparison says before it begins, and what follows from its results."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from visadapt.cli.output import say, show
from visadapt.data.splits import without_samples
from visadapt.experiments import ImageProblem, Problem, Result, TextProblem
from visadapt.experiments.catalogue import FULL
from visadapt.experiments.fair import LENGTHS
from visadapt.report.advice import budgets, by_network, lead, taken
from visadapt.report.claims import MAX_LOSS
from visadapt.report.crossmodal import crossmodal
from visadapt.report.paired import paired_tables, untrained
from visadapt.report.statistics import group_by

IMBALANCED = 0.6
"""Share of the test samples of one class from which accuracy says little of the others."""


def described(problem: Problem, lengths: Sequence[int]) -> list[str]:
    """What a problem consists of, what was decided for it, and how far its test set can tell methods apart."""
    data, where = problem.splits, f"{problem.backbone} {problem.name}"
    labels, count = data.test.labels, len(data.test)
    kind = f"samples of {len(data.classes)} classes" if data.classes else "samples with real values"
    lines = [
        *data.remarks,
        f"{where}: {len(data.train):,} training, {len(data.validation):,} validation and {count:,} test {kind}, scored "
        f"by {problem.metric}",
    ]
    lines += [f"{where}: {each}" for each in without_samples(data.classes, data.train.labels, "samples")]
    if problem.metric == "accuracy":
        most = float(torch.bincount(labels).max()) / count
        lines.append(
            f"{where}: the most frequent class is {100 * most:.0f} % of the test samples; one sample is "
            f"{100 / count:.2g} points"
        )
        if most >= IMBALANCED and len(data.classes) > 1:
            lines.append(f"{where}: classes are imbalanced; --metric macro_f1 gives each class the same weight")
    if isinstance(problem, ImageProblem) and problem.augment is not None:
        mirrored = "and half of them mirrored" if "mirror" in problem.augment else "none is mirrored (see --mirror)"
        lines.append(f"{where}: training images of {problem.size} px are moved at random, {mirrored}")
    if isinstance(problem, TextProblem):
        full = data.train.inputs["attention_mask"].sum(1) >= problem.length
        if full.any():
            cut = f"{100 * float(full.double().mean()):.0f} % of the training texts are cut to {problem.length} tokens"
            lines.append(f"{where}: {cut} (see --length), or just fit")
    if lengths and lengths[0] > LENGTHS[problem.modality][0]:
        lines.append(f"{where}: more epochs than usual, as few samples are few steps per epoch")
    return lines


def conclude(results: Sequence[Result]) -> None:
    """Print the tables of a comparison, and what they decide."""
    for each in paired_tables(results):
        show(each)
    decided = []
    for network, group in group_by(results, lambda r: r.network).items():
        if FULL in untrained(group):
            say(f"On {network}, nothing is decided: full fine-tuning gained nothing, with these epochs and samples.")
        else:
            decided += group
    for line in lead(decided):
        say(line)
    for network, comparisons in by_network(decided).items():
        best = taken(comparisons)
        if best is not None and best.low <= -MAX_LOSS and best.verdict != "below":
            say(
                f"On {network}, the interval is wide: {best.name} may be more than {MAX_LOSS:g} point worse. More "
                "seeds, problems or test samples narrow it."
            )
    if (decision := budgets(decided)) is not None:
        show(decision)
    if (section := crossmodal(results)) is not None:
        say(section.finding)
        for each in section.tables:
            show(each)
