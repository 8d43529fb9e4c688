"""What the supported versions of torch can do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from visadapt.backbone.tracing import READS_CONTEXT


def needs_torch(version: str, reason: str) -> pytest.MarkDecorator:
    """Mark a test of what older versions of torch cannot do; another test says what happens with those."""
    return pytest.mark.skipif(torch.__version__ < version, reason=f"needs torch {version}: {reason}")


ONE_GRAPH = needs_torch("2.14", "torch.compile reads the active task within a graph")
"""Mark of tests that count graphs. `compiled_whole` is what all versions are to answer alike."""

LOADS_PROGRAMS = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
"""Mark of tests that call ``torch.export.load``, which in some versions warns of how it reads the file."""


def compiled_whole(model: nn.Module, **options: Any) -> Any:
    """Compile a model as one graph; where torch cannot read the active task in a graph, hosts run uncompiled."""
    return torch.compile(model, fullgraph=READS_CONTEXT, **options)
