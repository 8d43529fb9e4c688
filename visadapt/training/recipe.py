"""Recipes: how long, how fast and with what schedule a task is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from visadapt.errors import VisadaptError
from visadapt.methods.method import check_choice

SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Recipe:
    """Houlsby's recipe (Houlsby et al. 2019, arXiv 1902.00751, §3.1): AdamW, warm-up over a tenth, linear decay to 0.

    The paper sweeps ``lr`` over {3e-5, 3e-4, 3e-3} and ``epochs`` over {3, 20} on validation data; so should you.

    Args:
        epochs: passes over the training data.
        lr: peak learning rate.
        head_lr: that of the task's head; None is ``lr``. A new head beside pretrained weights that move slowly, as in
            full fine-tuning, wants a larger one.
        norm_lr: that of the norms outside the head; None is ``lr``.
        batch_size: samples a step.
        warmup: fraction of the steps over which the rate rises linearly.
        schedule: what follows: ``linear`` or ``cosine`` decay to 0, or ``constant``.
        weight_decay: decoupled, on matrices and kernels only: not on biases, not on norms.
        betas: AdamW's.
        eps: AdamW's.
        grad_clip: largest norm of the whole gradient; None leaves it as it is.
        label_smoothing: of the cross entropy.

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
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    grad_clip: float | None = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self.schedule, SCHEDULES, "schedule")
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise VisadaptError(f"{name} is a positive int, got {value!r}")
        for name in ("lr", "head_lr", "norm_lr", "grad_clip", "eps"):
            value = getattr(self, name)
            optional = name in ("head_lr", "norm_lr", "grad_clip")
            if not (optional and value is None) and not (_finite(value) and value > 0):
                raise VisadaptError(f"{name} is a positive number, got {value!r}")
        for name in ("warmup", "label_smoothing"):
            value = getattr(self, name)
            if not (_finite(value) and 0 <= value < 1):
                raise VisadaptError(f"{name} is a fraction in [0, 1), got {value!r}")
        if not (_finite(self.weight_decay) and self.weight_decay >= 0):
            raise VisadaptError(f"weight_decay is a number from 0 up, got {self.weight_decay!r}")
        if len(self.betas) != 2 or not all(_finite(beta) and 0 <= beta < 1 for beta in self.betas):
            raise VisadaptError(f"betas are two numbers in [0, 1), got {self.betas!r}")

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
        done = min(1.0, (step - warm) / max(1, steps - warm))
        return 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    def optimiser(
        self, parameters: Iterable[tuple[str, nn.Parameter]], steps: int, norms: set[str], head: set[str]
    ) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """AdamW and its schedule, to be advanced once a step.

        Args:
            parameters: by name.
            steps: of the whole training.
            norms: names of those that belong to norms, which have their own rate and never decay.
            head: names of those of the head, which have their own rate.
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in parameters:
            # biases, gains and every other vector: decay would pull them to a zero that means nothing there
            decays = parameter.ndim > 1 and name not in norms
            own = self.head_lr if name in head else self.norm_lr if name in norms else None
            group = (self.lr if own is None else own, self.weight_decay if decays else 0.0)
            groups.setdefault(group, []).append(parameter)
        optimiser = torch.optim.AdamW(
            [{"params": members, "lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
        )
        return optimiser, LambdaLR(optimiser, lambda step: self.factor(step, steps))


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
