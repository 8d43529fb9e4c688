"""The scores of a task after training, as its notes hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visadapt.checks import is_real

SPLITS = ("validation", "test")


def measured(notes: Mapping[str, Any]) -> dict[str, str]:
    """Describe the note ``metrics`` of a task, in words.

    The command line writes ``{"metric": "accuracy", "test": {"score": 0.93, "samples": 40}, "seed": 0}``, with
    ``validation`` beside ``test``; other programs may write numbers by name.

    Args:
        notes: of the task.

    Returns:
        The scores, with the number of samples, by the name of the metric and the split; empty if none are noted.
    """
    noted = notes.get("metrics")
    if not isinstance(noted, Mapping):
        return {}
    words: dict[str, str] = {}
    for name, value in noted.items():
        if name in SPLITS and isinstance(value, Mapping) and is_real(value.get("score")):
            metric, samples = noted.get("metric"), value.get("samples")
            title = f"{metric} ({name})" if isinstance(metric, str) else name
            words[title] = f"{value['score']:.4f}" + (f" on {samples:,} samples" if isinstance(samples, int) else "")
        elif name != "seed" and is_real(value):
            words[str(name)] = f"{value:.4f}"
    if words and isinstance(noted.get("seed"), int):
        words["seed"] = str(noted["seed"])
    return words


def seed_of(notes: Mapping[str, Any]) -> int:
    """Return the seed of the splits that a task was trained and scored on; 0 if its notes do not say.

    Args:
        notes: of the task.
    """
    noted = notes.get("metrics")
    seed = noted.get("seed") if isinstance(noted, Mapping) else None
    return seed if isinstance(seed, int) and not isinstance(seed, bool) and abs(seed) < 1 << 63 else 0
