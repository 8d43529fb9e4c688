"""Adapters that would get no gradients: those inside an autograd function of the model, whose inputs are all frozen.

Reversible layers (Reformer) and reentrant checkpointing run modules inside a ``torch.autograd.Function``, which
autograd differentiates only if one of its inputs requires a gradient. Beside a frozen backbone, none does.
"""

from __future__ import annotations

from typing import Any

from torch.autograd.function import BackwardCFunction

from visadapt.errors import VisadaptError
from visadapt.runtime.blocks import BLOCKS, Block, frames
from visadapt.runtime.registry import Parts


def check_gradients(parts: Parts, tasks: Any) -> None:
    """Check a forward in train mode at a host that runs without gradients.

    Args:
        parts: of the host.
        tasks: the active task, or one per sample.

    Raises:
        VisadaptError: autograd recorded where the forward began, and the adapters of a task run inside an autograd
            function none of whose inputs requires a gradient.
    """
    block = _outermost((BLOCKS.get() or {}).get(parts._registry._number))
    if block is None or not block.records:
        return
    names = tasks if isinstance(tasks, tuple) else (tasks,)
    held = [(name, parts._of(name)) for name in dict.fromkeys(names) if name is not None]
    trained = [name for name, own in held if own is not None and any(p.requires_grad for p in own.parameters())]
    function = _around(block) if trained else None
    if function is not None and not any(function.needs_input_grad):
        name = type(function).__name__.removesuffix("Backward")
        raise VisadaptError(
            f"the adapters of task {trained[0]!r} at {parts._path} would get no gradients: they run inside {name}, an "
            "autograd function none of whose inputs requires a gradient. Call model.enable_input_require_grads() (of "
            "transformers), let the model's input require a gradient, or checkpoint with use_reentrant=False"
        )


def _outermost(block: Block | None) -> Block | None:
    """Return the block of the whole model's forward; the others in it are of its parts."""
    found = None
    while block is not None:
        found = block if block.captured and block.owner is not None else found
        block = block.below
    return found


def _around(block: Block) -> Any:
    """Return the context of the innermost autograd function that runs within a block; None if there is none."""
    for frame in frames():
        if frame is block.owner:
            return None
        for name in frame.f_code.co_varnames[:1]:
            held = frame.f_locals.get(name)
            if isinstance(held, BackwardCFunction):
                return held
    return None
