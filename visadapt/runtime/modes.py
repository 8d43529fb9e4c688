"""The modes of a model's modules, train or eval, kept over a block that changes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from visadapt.runtime.task_modules import TaskModules


@contextmanager
def keep_modes(model: nn.Module) -> Iterator[None]:
    """Restore each module's mode, train or eval, when the block ends.

    Tasks that are not in use keep the modes of their modules, too. One that comes into use within the block takes the
    mode that was last set for all tasks before it: enter blocks that choose a task first.
    """
    modes = [(module, module.__dict__["training"]) for module in model.modules()]
    followed = [(module, module._modes_set()) for module, _ in modes if isinstance(module, TaskModules)]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parts, before in followed:
            parts._as_set(before)
