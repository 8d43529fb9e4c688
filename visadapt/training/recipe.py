"""Recipes: epochs, learning rates, schedule and optimiser of a training run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from visadapt.arguments import check_fields, readable, takes
from visadapt.checks import (
    check_choice,
    check_count,
    check_flag,
    check_fraction,
    check_non_negative,
    check_positive,
    is_real,
)
from visadapt.data.augmentation import Augmentation
from visadapt.errors import VisadaptError
from visadapt.printable import shown
from visadapt.training.target import Target

SCHEDULES = ("linear", "cosine", "step", "constant")

OPTIMIZERS = ("adamw", "sgd")

EARLIER: dict[str, Any] = {
    "head_first": False,
    "fast": False,
    "compile": None,
    "random_crop": None,
    "rand_augment": None,
    "mixup": 0.0,
    "cutmix": 0.0,
}
"""What recipes were before they had these options, for checkpoints and results of that time."""

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "graphs")


@dataclass(frozen=True)
class Recipe:
    """Houlsby's recipe (Houlsby et al. 2019, arXiv 1902.00751, §3.1): AdamW, warm-up over a tenth, linear decay to 0.

    The paper sweeps ``lr`` over {3e-5, 3e-4, 3e-3} and ``epochs`` over {3, 20} on validation data; do the same for your
    task. Other papers' recipes are in ``RECIPES``.

    Args:
        epochs: passes over the training data.
        lr: peak learning rate.
        head_lr: peak learning rate of the task's head; None for ``lr``. Use a larger one for a new head beside
            pretrained weights that move slowly, as in full fine-tuning.
        norm_lr: peak learning rate of the norms outside the head; None for ``lr``.
        batch_size: samples per step, over all processes.
        warmup: fraction of the steps over which the rate rises linearly.
        schedule: after the warm-up: ``linear`` or ``cosine`` decay to 0, ``step`` (a tenth from each milestone on), or
            ``constant``.
        milestones: for the ``step`` schedule, as fractions of all steps.
        optimizer: ``adamw`` or ``sgd``.
        weight_decay: of matrices and kernels only, not of biases or norms. Decoupled in AdamW, part of the gradient in
            SGD.
        adapter_decay: weight decay of the matrices and kernels that the method added; None for ``weight_decay``.
        betas: of AdamW.
        eps: of AdamW.
        momentum: of SGD.
        grad_clip: maximum norm of the whole gradient; None for no clipping.
        label_smoothing: of the cross entropy.
        patience: number of epochs without a better score after which training stops; None to train all epochs.
        head_first: start a new head as the linear probe on features that are computed once (LP-FT, Kumar et al. 2022,
            arXiv 2202.10054), where it is one linear layer; the result says what was done. With validation data, or
            a share of the training data held back for it, the probe counts as epoch 0: no later epoch is kept that is
            not better. Without, the last epoch is kept, even if it is worse than the probe.
        fast: compute in bf16 autocast and images in the channels-last memory format, which the model keeps.
        compile: mode of ``torch.compile`` for the training steps: ``default``, ``reduce-overhead`` (CUDA graphs) or
            ``max-autotune``; ``graphs`` for CUDA graphs of the model's own kernels, which take a second and no
            compiler; None for neither.
        random_crop: smallest area of a random crop of each training image, as a fraction of the image, in (0, 1]; the
            crop is resized (RandomResizedCrop) and mirrored half of the time. None for no such crop.
        rand_augment: timm's configuration of RandAugment (Cubuk et al. 2019, arXiv 1909.13719), such as
            ``"rand-m9-mstd0.5"``; needs ``random_crop``.
        mixup: alpha of mixup (Zhang et al. 2017, arXiv 1710.09412); 0 for none.
        cutmix: alpha of CutMix (Yun et al. 2019, arXiv 1905.04899); 0 for none. With both, each batch takes one.

    Raises:
        VisadaptError: a value is out of range; the message names it.

    Examples:
        >>> recipe = Recipe(epochs=20, lr=3e-3, patience=3)
        >>> recipe.replace(warmup=0.0).factor(0, 10)
        1.0
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
    head_first: bool = True
    fast: bool = False
    compile: str | None = None
    random_crop: float | None = None
    rand_augment: str | None = None
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        check_flag(self.head_first, "head_first")
        check_flag(self.fast, "fast")
        if self.compile is not None:
            check_choice(self.compile, COMPILE_MODES, "compile mode")
        numbers = (name for names in _CHECKS.values() for name in names)
        check_fields(self, "betas", "compile", "head_first", "fast", *numbers)
        check_choice(self.schedule, SCHEDULES, "schedule")
        check_choice(self.optimizer, OPTIMIZERS, "optimizer")
        for check, names in _CHECKS.items():
            for name in names:
                value = getattr(self, name)
                if value is not None or name not in _OPTIONAL:
                    check(value, name)
        if not readable(self.betas, Sequence[Any]) or len(self.betas) != 2 or not all(map(_is_fraction, self.betas)):
            raise VisadaptError(f"betas must be two numbers in [0, 1), got {shown(self.betas)}")
        if not all(map(_is_fraction, self.milestones)) or list(self.milestones) != sorted(self.milestones):
            raise VisadaptError(f"milestones must be increasing fractions in [0, 1), got {shown(self.milestones)}")

        _ = self.augmentation  # checks the values

    @property
    def augmentation(self) -> Augmentation:
        """How training images are changed."""
        return Augmentation(self.random_crop, self.rand_augment, self.mixup, self.cutmix)

    def replace(self, **changes: Any) -> Recipe:
        """Copy the recipe with some fields changed."""
        return dataclasses.replace(self, **changes)

    @takes()
    def factor(self, step: int, steps: int) -> float:
        """The factor on the peak rate at ``step``, counted from 0, of ``steps`` in all; 0 after the last.

        No step has a rate of exactly zero: the first has 1 / (warm-up steps + 1) of the peak, which is reached at the
        step after the warm-up.
        """
        check_non_negative(step, "step")
        check_count(steps, "steps")
        return self._factor(step, steps)

    def _factor(self, step: int, steps: int) -> float:
        warm = round(self.warmup * steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            return 0.1 ** sum(step >= round(milestone * steps) for milestone in self.milestones)
        done = min(1.0, (step - warm) / max(1, steps - warm))
        return 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    @takes()
    def make_optimizer(self, target: Target, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Make the optimiser and its schedule, to be advanced once per step.

        Args:
            target: the parameters with their roles.
            steps: of the whole training run.
        """
        check_count(steps, "steps")
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in target.parameters.items():
            groups.setdefault((self._rate(name, target), self._decay(name, target)), []).append(parameter)
        members = [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()]
        optimizer: torch.optim.Optimizer
        # fused: on a CPU torch's default is ten times slower, half of a small batch's step if every weight is trained
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(members, lr=self.lr, momentum=self.momentum, fused=True)
        else:
            optimizer = torch.optim.AdamW(members, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        return optimizer, LambdaLR(optimizer, lambda step: self._factor(step, steps))

    def _rate(self, name: str, target: Target) -> float:
        rate = self.head_lr if name in target.head else self.norm_lr if name in target.norms else None
        return self.lr if rate is None else rate

    def _decay(self, name: str, target: Target) -> float:
        if target.parameters[name].ndim < 2 or name in target.norms:
            # biases, gains and other vectors: zero is not a neutral value for them
            return 0.0
        decay = self.adapter_decay if name in target.adapters else None
        return self.weight_decay if decay is None else decay


_CHECKS: dict[Callable[[Any, str], None], tuple[str, ...]] = {
    check_count: ("epochs", "batch_size", "patience"),
    check_positive: ("lr", "head_lr", "norm_lr", "grad_clip", "eps"),
    check_fraction: ("warmup", "label_smoothing", "momentum"),
    check_non_negative: ("weight_decay", "adapter_decay"),
}

_OPTIONAL = ("head_lr", "norm_lr", "adapter_decay", "grad_clip", "patience")


def _is_fraction(value: Any) -> bool:
    return is_real(value) and 0 <= value < 1
