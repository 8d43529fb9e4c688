"""A copy of a backbone that is run to examine it, without effects on the original."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.added import replaces
from visadapt.backbone.batch import leaves
from visadapt.backbone.full_precision import full_precision
from visadapt.backbone.modules import own_modules, plain_copy
from visadapt.backbone.trace import quiet


def twin_of(backbone: nn.Module) -> nn.Module:
    """Return a plain copy of a backbone that shares its weights, so that a forward changes no state of the original."""
    memo: dict[int, Any] = {}
    for module in own_modules(backbone).values():
        memo |= {id(p): p for p in module._parameters.values() if p is not None}
        for _, held in leaves(list(module.__dict__.values())):
            if isinstance(held, Tensor) and not held.is_leaf:
                # torch refuses to copy a tensor that is part of an autograd graph
                memo[id(held)] = held.detach()
    twin = plain_copy(backbone, memo)
    held = {id(value) for module in twin.modules() for value in (module, *module.__dict__.values())}
    for module in twin.modules():
        for name, hooks in module.__dict__.items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                # drop the user's hooks, which must not see this run; keep those that take part in the forward: the
                # model's own, which may make its output, and those that replace what they are shown
                for key in [key for key, hook in hooks.items() if not (_is_bound(hook, held) or replaces(hook))]:
                    del hooks[key]
        # transformers installs the hooks that collect hidden states once per model
        module.__dict__.pop("_output_capturing_hooks_installed", None)
        if any(name.startswith("running_") for name in module._buffers):
            # the frozen backbone uses its running statistics, never those of the batch
            module.training = False
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the fused kernel would not call the modules inside
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return twin


@contextmanager
def examining(twin: nn.Module) -> Iterator[None]:
    """Compare outputs of a copy in this block: no gradients, no TF32, no warnings, and the random state is restored."""
    devices = {p.device for p in twin.parameters() if p.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)), quiet(), full_precision():
        yield


def _is_bound(hook: Any, held: set[int]) -> bool:
    """Return whether a hook is a method of one of the model's modules or of an object in one (``FeatureHookNet``)."""
    while isinstance(hook, partial):
        hook = hook.func
    return isinstance(hook, MethodType) and id(hook.__self__) in held
