"""The state of a training run as a checkpoint holds it, checked whole before anything is restored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visadapt.errors import VisadaptError
from visadapt.training.loop import Loop, Run

SCHEDULE: dict[str, Any] = {"last_epoch": int, "_step_count": int, "_last_lr": list[float]}
"""What is kept of a schedule, with types."""

_PARTS = ("now", "kept", "optimiser", "began", "here")

_SLOTS = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}


@dataclass(frozen=True)
class SavedState:
    """The state of a training run.

    Args:
        run: its progress.
        schedule: entries of the schedule, as in ``SCHEDULE``.
        tensors: ``part:name`` → tensor. The parts are ``now`` and ``kept``, states of the target; ``optimiser``, by
            index of the parameter and slot; ``began`` and ``here``, states of the random generators, one row per
            process.
    """

    run: Run
    schedule: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, by name."""
        return {key.removeprefix(f"{name}:"): t for key, t in self.tensors.items() if key.startswith(f"{name}:")}

    def check(self, loop: Loop) -> None:
        """Refuse a state that is not one of this training run.

        Raises:
            VisadaptError: an entry is missing, unknown, out of range, or of another shape or dtype.
        """
        unknown = [key for key in self.tensors if key.partition(":")[0] not in _PARTS]
        if unknown:
            raise VisadaptError(f"it has a tensor {unknown[0]!r}, which no training run has")
        self._check_progress(loop)
        for name in ("now", "kept"):
            _check_tensors(self.part(name), loop.target.tensors, name)
        self._check_optimiser(loop)
        state = loop.random.state()
        rows = {key: value.expand(loop.engine.processes, -1) for key, value in state.items()}
        for name in ("began", "here"):
            found = self.part(name)
            _check_tensors(found, rows, name)
            for key, value in found.items():
                _check_generator(value, "cuda" if key == "cuda" else "cpu", f"{name}:{key}")

    def _check_progress(self, loop: Loop) -> None:
        run, per_epoch = self.run, len(loop.batches)
        done = len(run.epochs)
        if [epoch.number for epoch in run.epochs] != list(range(1, done + 1)) or done > loop.recipe.epochs:
            raise VisadaptError(f"its epochs must be numbered from 1 to {loop.recipe.epochs} at most")
        # no epoch is the best before the first, and where the head's start was scored and stayed the best
        if not (0 < run.best <= done or (run.best == 0 and (done == 0 or run.start is not None))):
            raise VisadaptError(f"its best epoch must be one of the {done} finished, got {run.best}")
        # a loader may yield fewer batches than it says
        exact = loop.batches.samples is None or run.steps == done * per_epoch + run.at
        if not 0 <= run.at <= min(per_epoch, run.steps) or not exact:
            raise VisadaptError(f"it has {run.steps} steps, {run.at} of them in an epoch of {per_epoch}")
        if (run.seen > 0) != (run.at > 0) or run.seen < 0 or not math.isfinite(run.loss):
            raise VisadaptError(f"its loss {run.loss} over {run.seen} samples does not belong to {run.at} steps")
        rates = self.schedule["_last_lr"]
        if len(rates) != len(loop.optimizer.param_groups):
            raise VisadaptError("it has other learning rates")
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise VisadaptError(f"its learning rates must be numbers of 0 or more, got {rates}")
        if self.schedule["last_epoch"] != run.steps or self.schedule["_step_count"] != run.steps + 1:
            raise VisadaptError(f"its schedule is not that of step {run.steps}")

    def _check_optimiser(self, loop: Loop) -> None:
        parameters = [p for group in loop.optimizer.param_groups for p in group["params"]]
        recipe, steps = loop.recipe, self.run.steps
        slots = _SLOTS[recipe.optimizer] if recipe.optimizer != "sgd" or recipe.momentum else set()
        found: dict[int, set[str]] = {}
        for key, value in self.part("optimiser").items():
            index, _, slot = key.partition(".")
            if not (index.isascii() and index.isdigit() and len(index) < 9 and int(index) < len(parameters)):
                raise VisadaptError(f"optimiser:{key} belongs to none of its {len(parameters)} parameters")
            found.setdefault(int(index), set()).add(slot)
            like = torch.zeros(()) if slot == "step" else parameters[int(index)]
            _check_like(value, like, f"optimiser:{key}")
            if slot == "step" and not 0 < value.item() <= steps:
                raise VisadaptError(f"optimiser:{key} is {value.item()}, and there were {steps} steps")
        wrong = next((index for index, names in found.items() if names != slots), None)
        if wrong is not None:
            raise VisadaptError(f"optimiser:{wrong} must have {sorted(slots)}, got {sorted(found[wrong])}")
        if steps and slots and not found:
            raise VisadaptError(f"it lacks the state of the optimiser after {steps} steps")


def _check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    odd = sorted(found.keys() ^ expected.keys())
    if odd:
        raise VisadaptError(f"it {'lacks' if odd[0] in expected else 'has an unknown'} {what}:{odd[0]}")
    for name, like in expected.items():
        _check_like(found[name], like, f"{what}:{name}")


def _check_like(found: Tensor, like: Tensor, what: str) -> None:
    if found.shape != like.shape or found.dtype != like.dtype:
        raise VisadaptError(f"{what} is {found.dtype} {tuple(found.shape)}, expected {like.dtype} {tuple(like.shape)}")


def _check_generator(rows: Tensor, device: str, what: str) -> None:
    try:
        for row in rows:
            # cloned: torch crashes on a generator state that is a row of a larger tensor
            torch.Generator(device).set_state(row.clone())
    except (RuntimeError, TypeError) as error:
        raise VisadaptError(f"{what} is not the state of a random generator: {error}") from error
