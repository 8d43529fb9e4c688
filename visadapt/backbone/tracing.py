"""Whether this thread is making a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import _symbolic_trace

READS_CONTEXT = torch.__version__ >= "2.14"
"""Whether dynamo reads a context variable, and so the active task, in a graph."""

is_symbolic_tracing: Callable[[], bool] = (
    getattr(_symbolic_trace, "is_fx_symbolic_tracing", None) or _symbolic_trace.is_fx_tracing
)
"""Whether torch.fx traces; older versions of torch have it by its other name."""

is_recording: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
"""Whether ``torch.jit.trace`` records the calls of this thread."""


def is_tracing() -> bool:
    """Whether this very code is being traced into a graph, by dynamo or by a non-strict export of this thread.

    ``torch.compiler.is_compiling()`` alone is also true while another thread compiles something else.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and torch._guards.detect_fake_mode() is not None


def runs_uncompiled() -> bool:
    """Whether dynamo traces what it cannot: every host would end a graph, and what chooses tasks would be traced."""
    return not READS_CONTEXT and torch.compiler.is_dynamo_compiling()


def run_uncompiled_before_torch_2_14(forward: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run a forward without the compiler, which with ``fullgraph=True`` names this function in its error."""
    return forward(module, *args, **kwargs)


if not READS_CONTEXT:
    # elsewhere it is never called, and this decorator imports dynamo, which takes longer than all of this library
    run_uncompiled_before_torch_2_14 = torch.compiler.disable(run_uncompiled_before_torch_2_14)  # type: ignore[no-untyped-call]
