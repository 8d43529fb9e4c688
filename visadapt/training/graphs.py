"""CUDA graphs of training steps: a batch's kernels are started together, not one by one from Python.

A step of a small model on a large GPU takes as long as Python needs to start its kernels. A graph contains those of the
forward and the backward pass, and starts them at once; they are the same kernels, so nothing is compiled.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Function = Callable[[Any], Tensor]

log = logging.getLogger(__name__)

LEAST = 3
"""Batches of one shape from which a graph is made of it; each batch before, and of other shapes, runs as usual."""

MOST = 16
"""Shapes of which graphs are made at most: each keeps the memory of a step."""


class Graphs:
    """A function from a batch to outputs that runs as a CUDA graph, one per shape of batch.

    Args:
        function: computes outputs ``(N, …)`` of a batch, a tensor or a mapping or sequence of tensors; it must do the
            same for each batch of one shape, and not wait for the device.
        parameters: what gradients flow to.
        model: holds the buffers that the function changes.
        device: the GPU.
    """

    def __init__(
        self, function: Function, parameters: Iterable[nn.Parameter], model: nn.Module, device: torch.device
    ) -> None:
        self._function, self._parameters, self._model, self._device = function, tuple(parameters), model, device
        self._seen: Counter[Hashable] = Counter()
        self._made: dict[Hashable, Callable[..., Tensor] | None] = {}

    def __call__(self, batch: Any) -> Tensor:
        """Compute the outputs of a batch; its graph is made when its shape comes the third time."""
        leaves, structure = pytree.tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            return self._function(batch)
        shape = (str(structure), tuple((leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves))
        self._seen[shape] += 1
        if shape not in self._made:
            if self._seen[shape] < LEAST or len(self._made) == MOST:
                return self._function(batch)
            self._made[shape] = self._capture(leaves, structure)
        graph = self._made[shape]
        return self._function(batch) if graph is None else graph(*leaves, *self._parameters)

    def _capture(self, leaves: list[Tensor], structure: Any) -> Callable[..., Tensor] | None:
        """Make the graph; None if the function does what no graph may."""
        count = len(leaves)

        def run(*inputs: Tensor) -> Tensor:
            return self._function(pytree.tree_unflatten(list(inputs[:count]), structure))

        # the passes that come before a capture move statistics and random states, which are put back
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        random = torch.cuda.get_rng_state(self._device)
        examples = tuple(leaf.detach().clone() for leaf in leaves)
        kind = self._device.type
        try:
            # copies of weights in bf16 must be made within the graph
            with torch.autocast(
                kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
            ):
                made: Any = torch.cuda.make_graphed_callables(
                    run, (*examples, *self._parameters), allow_unused_input=True
                )
        except RuntimeError as error:
            log.warning("no CUDA graph: %s", str(error).splitlines()[0])
            made = None
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        torch.cuda.set_rng_state(random, self._device)
        return cast("Callable[..., Tensor] | None", made)
