"""Where a step is computed: device, precision, backward. The one file that another engine would replace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.errors import VisadaptError
from visadapt.frozen.prefix import Resumable
from visadapt.methods.method import check_choice

PRECISIONS = ("fp32", "bf16")


class Engine:
    """Plain torch, one process.

    Args:
        model: what will be run; moved to the device in place.
        device: None for where the model is.
        precision: ``fp32``, or ``bf16`` for autocast with parameters and gradients kept as they are.

    Raises:
        VisadaptError: there is no such device here, or no such precision.
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None = None, precision: str = "fp32") -> None:
        check_choice(precision, PRECISIONS, "precision")
        self.precision = precision
        first = next((p for p in model.parameters()), None)
        self.device = torch.device("cpu") if first is None else first.device
        if device is not None:
            try:
                self.device = torch.device(device)
                model.to(self.device)
            except (RuntimeError, AssertionError) as error:
                raise VisadaptError(
                    f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}"
                ) from error

    def place(self, batch: Any) -> Any:
        """A batch on the device: tensors, and mappings and sequences of them."""
        if isinstance(batch, Tensor):
            return batch.to(self.device, non_blocking=True)
        if isinstance(batch, Mapping):
            return {key: self.place(value) for key, value in batch.items()}
        if isinstance(batch, Sequence) and not isinstance(batch, str):
            return tuple(self.place(value) for value in batch)
        return batch

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the forward is computed."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss."""
        torch.autograd.backward(loss)

    def clip(self, parameters: list[nn.Parameter], limit: float | None) -> float:
        """The norm of the whole gradient, scaled down to ``limit`` where it is larger. Not finite, it stays so."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if limit is not None and bool(norm.isfinite()):
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm.item()

    def seeded(self, seed: int) -> AbstractContextManager[Any]:
        """A context whose random numbers (dropout's) follow from ``seed`` and leave the caller's as they were."""
        return _Seeded(seed, self.device)


class _Seeded:
    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        devices = [device] if device.type == "cuda" else []
        self.fork = torch.random.fork_rng(devices=devices)

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *exception: Any) -> None:
        self.fork.__exit__(*exception)


def call(model: nn.Module, inputs: Any) -> Tensor:
    """The logits for a batch: a tensor, keyword arguments, a tuple of arguments, or what can be resumed."""
    if isinstance(inputs, Resumable):
        out = inputs.resume()
    elif isinstance(inputs, Mapping):
        out = model(**inputs)
    else:
        out = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    logits = getattr(out, "logits", out)
    if isinstance(logits, tuple):
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise VisadaptError(f"expected logits of shape (N, classes) from {type(model).__name__}, got {got}")
    return logits
