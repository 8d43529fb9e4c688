"""The score of the Visual Decathlon: one number for how a method does on many tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from visadapt.errors import VisadaptError, nearest

FINE_TUNED = {
    "imagenet": 59.87,
    "aircraft": 60.34,
    "cifar100": 82.12,
    "dped": 92.82,
    "dtd": 55.53,
    "gtsrb": 97.53,
    "flowers": 81.41,
    "omniglot": 87.69,
    "svhn": 96.55,
    "ucf101": 51.20,
}
"""The challenge's tasks and the accuracy in % of a fine-tuned network, to which a score is relative."""

Accuracies = Mapping[str, float] | Sequence[float]


def score(accuracies: Accuracies, baselines: Accuracies = FINE_TUNED) -> float:
    """S = Σ_d α_d · max(0, Emax_d − E_d)², with Emax_d twice the baseline's error and α_d = 1000 / Emax_d².

    Ten tasks without an error score 10 000, the baseline itself 2 500 (Rebuffi et al. 2017, arXiv 1705.08045, §4).

    Args:
        accuracies: in %, by task or in the order of ``baselines``.
        baselines: likewise, of what to compare with; none of them 100.

    Raises:
        VisadaptError: the tasks are not the same, or something is no percentage.
    """
    found, base = _named(accuracies, baselines), _named(baselines, baselines)
    total = 0.0
    for task, baseline in base.items():
        if task not in found:
            raise VisadaptError(f"no accuracy for task {task!r}{nearest(task, found)}")
        if not 0 <= found[task] <= 100 or not 0 <= baseline < 100:
            raise VisadaptError(
                f"accuracies are in %, the baselines' below 100; {task!r} has {found[task]}, {baseline}"
            )
        most = 2 * (100 - baseline)
        total += 1000 * max(0.0, 1 - (100 - found[task]) / most) ** 2
    extra = [task for task in found if task not in base]
    if extra:
        raise VisadaptError(f"no baseline for task {extra[0]!r}{nearest(extra[0], base)}")
    return total


def _named(accuracies: Accuracies, order: Accuracies) -> dict[str, float]:
    if isinstance(accuracies, Mapping):
        return dict(accuracies)
    names = list(order) if isinstance(order, Mapping) else [str(i) for i in range(len(order))]
    if len(accuracies) != len(names):
        raise VisadaptError(f"{len(accuracies)} accuracies for {len(names)} tasks")
    return dict(zip(names, accuracies, strict=True))
