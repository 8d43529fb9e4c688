"""Recipes: how long, how fast and with what schedule a task is trained."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from visadapt.checks import check_choice
from visadapt.errors import VisadaptError
from visadapt.training.target import Trainee

SCHEDULES = ("linear", "cosine", "step", "constant")

OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class Recipe:
    """Houlsby's recipe (Houlsby et al. 2019, arXiv 1902.00751, §3.1): AdamW, warm-up over a tenth, linear decay to 0.

    The paper sweeps ``lr`` over {3e-5, 3e-4, 3e-3} and ``epochs`` over {3, 20} on validation data; so should you. Other
    papers' recipes are in ``RECIPES``.

    Args:
        epochs: passes over the training data.
        lr: peak learning rate.
        head_lr: that of the task's head; None is ``lr``. A new head beside pretrained weights that move slowly, as in
            full fine-tuning, wants a larger one.
        norm_lr: that of the norms outside the head; None is ``lr``.
        batch_size: samples a step, over all processes.
        warmup: fraction of the steps over which the rate rises linearly.
        schedule: what follows: ``linear`` or ``cosine`` decay to 0, ``step`` (a tenth from each milestone on), or
            ``constant``.
        milestones: fractions of the steps, of the ``step`` schedule.
        optimizer: ``adamw`` or ``sgd``.
        weight_decay: on matrices and kernels only: not on biases, not on norms. Decoupled in AdamW, part of the
            gradient in SGD.
        adapter_decay: that of the matrices and kernels that the method put in; None is ``weight_decay``.
        betas: AdamW's.
        eps: AdamW's.
        momentum: SGD's.
        grad_clip: largest norm of the whole gradient; None leaves it as it is.
        label_smoothing: of the cross entropy.
        patience: epochs without a better score after which training stops; None trains all of them.

    Raises:
        VisadaptError: a value is out of range; it is named.
    """

    epochs: int = 3
    lr: float = 1e-3
    head_lr: float | None = None
    norm_lr: float | None = None
    batch_size: int = 32
    warmup: float = 0.1
    schedule: str = "linear"
    milestones: tuple[float, ...] = (2 / 3, 5 / 6)
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    adapter_decay: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    momentum: float = 0.9
    grad_clip: float | None = 1.0
    label_smoothing: float = 0.0
    patience: int | None = None

    def __post_init__(self) -> None:
        check_choice(self.schedule, SCHEDULES, "schedule")
        check_choice(self.optimizer, OPTIMIZERS, "optimizer")
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            counts = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not counts and not (value is None and name == "patience"):
                raise VisadaptError(f"{name} is a positive int, got {value!r}")
        for name in ("lr", "head_lr", "norm_lr", "grad_clip", "eps"):
            value = getattr(self, name)
            optional = name in ("head_lr", "norm_lr", "grad_clip")
            if not (optional and value is None) and not (_finite(value) and value > 0):
                raise VisadaptError(f"{name} is a positive number, got {value!r}")
        for name in ("warmup", "label_smoothing", "momentum"):
            if not _fraction(getattr(self, name)):
                raise VisadaptError(f"{name} is a fraction in [0, 1), got {getattr(self, name)!r}")
        for name in ("weight_decay", "adapter_decay"):
            value = getattr(self, name)
            if not (name == "adapter_decay" and value is None) and not (_finite(value) and value >= 0):
                raise VisadaptError(f"{name} is a number from 0 up, got {value!r}")
        if len(self.betas) != 2 or not all(map(_fraction, self.betas)):
            raise VisadaptError(f"betas are two numbers in [0, 1), got {self.betas!r}")
        if not all(map(_fraction, self.milestones)) or list(self.milestones) != sorted(self.milestones):
            raise VisadaptError(f"milestones are rising fractions in [0, 1), got {self.milestones!r}")

    def replace(self, **changes: Any) -> Recipe:
        """The same recipe but for these fields."""
        return dataclasses.replace(self, **changes)

    def factor(self, step: int, steps: int) -> float:
        """What the peak rate is multiplied by at ``step`` of ``steps``, both counted from 0; 0 once all are done.

        No step is lost to a rate of exactly zero: the first has 1 / (warm-up + 1) of the peak, which is reached at the
        step after the warm-up.
        """
        warm = round(self.warmup * steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            return 0.1 ** sum(step >= round(milestone * steps) for milestone in self.milestones)
        done = min(1.0, (step - warm) / max(1, steps - warm))
        return 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    def prepared(self, trained: Trainee, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The optimiser and its schedule, to be advanced once a step.

        Args:
            trained: what is trained, and what role each parameter has.
            steps: of the whole training.
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in trained.parameters.items():
            groups.setdefault((self._rate(name, trained), self._decay(name, trained)), []).append(parameter)
        members = [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()]
        optimiser: torch.optim.Optimizer
        # torch's default is a tenth as fast on a CPU, and half of a small batch's step where every weight is trained
        if self.optimizer == "sgd":
            optimiser = torch.optim.SGD(members, lr=self.lr, momentum=self.momentum, fused=True)
        else:
            optimiser = torch.optim.AdamW(members, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        return optimiser, LambdaLR(optimiser, lambda step: self.factor(step, steps))

    def _rate(self, name: str, trained: Trainee) -> float:
        own = self.head_lr if name in trained.head else self.norm_lr if name in trained.norms else None
        return self.lr if own is None else own

    def _decay(self, name: str, trained: Trainee) -> float:
        if trained.parameters[name].ndim < 2 or name in trained.norms:
            # biases, gains and every other vector: decay would pull them to a zero that means nothing there
            return 0.0
        own = self.adapter_decay if name in trained.adapters else None
        return self.weight_decay if own is None else own


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _fraction(value: Any) -> bool:
    return _finite(value) and 0 <= value < 1
