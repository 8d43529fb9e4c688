"""Whether this thread is making a graph."""

from __future__ import annotations

import torch


def is_tracing() -> bool:
    """Whether this very code is being traced into a graph, by dynamo or by a non-strict export of this thread.

    ``torch.compiler.is_compiling()`` alone is also true while another thread compiles something else.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and torch._guards.detect_fake_mode() is not None
