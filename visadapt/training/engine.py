"""Devices, processes and precision, through accelerate; and the model as a module that returns logits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.checks import check_choice
from visadapt.data.inputs import TextInputs
from visadapt.data.samples import ready, trimmed
from visadapt.errors import VisadaptError, device_errors
from visadapt.frozen.cached_prefix import CachedPrefix, Resumable
from visadapt.optional import require
from visadapt.training.graphs import Graphs

PRECISIONS = ("fp32", "bf16")


class Engine:
    """accelerate, with the device and the precision of one training run.

    accelerate fixes both for the life of a process; runs in one process may differ.

    Args:
        model: the model to run; moved to the device in place.
        device: None for the model's own device or, among several processes, the one that accelerate assigns to each.
        precision: ``fp32``, or ``bf16`` for autocast with parameters and gradients in their own dtype; None for the
            precision given to ``accelerate launch``.
        accumulate: number of parts in which a batch is computed; ``accelerate launch`` may override it.

    Raises:
        VisadaptError: the device or the precision does not exist; accelerate is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | None = None,
        precision: str | None = None,
        accumulate: int = 1,
    ) -> None:
        if precision is not None:
            check_choice(precision, PRECISIONS, "precision")
        self._accelerate = require("accelerate", "training", "visadapt[train]")
        self.accelerator = self._accelerate.Accelerator(
            # without it, processes started by torchrun on a CPU-only machine do not form a group
            cpu=not torch.accelerator.is_available(),
            device_placement=False,
            gradient_accumulation_plugin=_accumulation(self._accelerate, accumulate),
            dataloader_config=self._accelerate.DataLoaderConfiguration(split_batches=True),
        )
        self.rank: int = self.accelerator.process_index
        self.processes: int = self.accelerator.num_processes
        self.parts: int = self.accelerator.gradient_accumulation_steps
        self.device = self._choose_device(model, device)
        launched = self.accelerator.mixed_precision
        self.precision = precision or ("fp32" if launched == "no" else launched)
        check_choice(self.precision, PRECISIONS, "precision")
        move(model, self.device)

    def _choose_device(self, model: nn.Module, device: torch.device | str | None) -> torch.device:
        with device_errors(device):
            chosen = None if device is None else torch.device(device)
        if self.processes == 1:
            first = next((p for p in model.parameters()), torch.empty(0))
            return first.device if chosen is None else chosen
        assigned: torch.device = self.accelerator.device
        if chosen is not None and chosen.type != assigned.type:
            raise VisadaptError(
                f"device must be {assigned.type!r} or None for these {self.processes} processes, got {str(device)!r}; "
                "`accelerate launch --cpu` runs them on the CPU"
            )
        return assigned

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that results depend on, as JSON values."""
        return {"precision": self.precision, "processes": self.processes, "parts of a batch": self.parts}

    def place(self, batch: Any) -> Any:
        """Move a batch (a tensor, or mappings and sequences of tensors) to the device."""
        return self._accelerate.utils.send_to_device(batch, self.device, non_blocking=True)

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate a tensor's parts from all processes."""
        gathered: Tensor = self.accelerator.gather(tensor)
        return gathered

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Copy the first process's values to all processes, in place."""
        self._accelerate.utils.broadcast(tensors)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context to run the forward pass in."""
        # disabled explicitly for fp32: accelerate may have been launched with another precision
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def _accumulation(accelerate: Any, parts: int) -> Any:
    """accelerate's plugin for the number of parts of a batch, which ``accelerate launch`` may override."""

    class Accumulation(accelerate.utils.GradientAccumulationPlugin):  # type: ignore[misc]
        def to_kwargs(self) -> dict[str, Any]:
            # to find the defaults, accelerate's own method empties the environment of the process for a moment, which
            # code in other threads may read then: kernels of torch crash
            return {"num_steps": self.num_steps}

    return Accumulation(num_steps=int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", parts)))


def move(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device, and write to none of its tensors if all of them are there.

    ``model.to()`` sets the data of each parameter even then, which is not safe beside a forward in another thread.

    Args:
        model: to move in place.
        device: where to.

    Raises:
        VisadaptError: the device does not exist, or cannot be used.
    """
    with device_errors(device):
        if any(tensor.to(device) is not tensor for tensor in _tensors(model)):
            model.to(device)


def channels_last(model: nn.Module) -> None:
    """Put the weights of a model into the channels-last memory format; see `move`."""
    form = torch.channels_last
    if any(tensor.ndim == 4 and tensor.to(memory_format=form) is not tensor for tensor in _tensors(model)):
        model.to(memory_format=form)  # type: ignore[call-overload]


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def check_device(device: torch.device | str) -> None:
    """Refuse a device that does not exist or that this process cannot use.

    Raises:
        VisadaptError: the device cannot be used; the message names it.
    """
    with device_errors(device):
        torch.empty(1, device=device)


class LogitsModel(nn.Module):
    """A model from a raw batch to float32 outputs: the module whose gradients the processes share.

    Args:
        model: computes the task that is active around the call.
        prepare: converts a batch of inputs on the device to the model's input.
        engine: the device and the precision.
        channels_last: whether images enter the model in that memory format.
        compile: mode of ``torch.compile`` in training; None for no compiling.
    """

    prepare: Callable[[Any], Any]
    compiled: Callable[..., Any] | None
    graphs: Graphs | None

    def __init__(
        self,
        model: nn.Module,
        prepare: Callable[[Any], Any],
        engine: Engine,
        channels_last: bool = False,
        compile: str | None = None,
    ) -> None:
        super().__init__()
        self.model, self.engine, self.channels_last = model, engine, channels_last
        # not registered, or its parameters would be there twice
        self.__dict__["compiled"] = None if compile is None else torch.compile(model, mode=compile)
        self.__dict__["graphs"] = None
        # past nn.Module's registration: a transform may be a module, but it is not part of the model
        self.__dict__["prepare"] = prepare

    def forward(self, inputs: Any) -> Tensor:
        """Compute the outputs: logits ``(N, C)``, of dense tasks ``(N, C, …)``, or real values ``(N, 1)``.

        Raises:
            VisadaptError: the model's output is not a tensor and has none that is known as such.
        """
        with self.engine.autocast():
            ready = self.prepare(inputs)
            if self.channels_last and isinstance(ready, Tensor) and ready.ndim == 4:
                ready = ready.contiguous(memory_format=torch.channels_last)
            if self.graphs is not None and self.training and torch.is_grad_enabled():
                return self.graphs(ready)
            model = self.model if self.compiled is None or not self.training else self.compiled
            return _outputs(model, ready).float()

    def capture(self, parameters: Iterable[nn.Parameter]) -> None:
        """Run training steps as CUDA graphs from now on; gradients flow to these parameters only.

        Raises:
            VisadaptError: the device has no such graphs, or a step is divided.
        """
        engine, model = self.engine, self.model
        if engine.device.type != "cuda":
            raise VisadaptError(f"device must be a CUDA device for compile='graphs', got {str(engine.device)!r}")
        if engine.processes > 1 or engine.parts > 1:
            raise VisadaptError("compile='graphs' needs one process and accumulate=1")
        self.__dict__["graphs"] = Graphs(lambda ready: _outputs(model, ready).float(), parameters, model, engine.device)

    def place(self, inputs: Any) -> Any:
        """Move a batch of inputs to the device; rows of a cached prefix stay where they are looked up."""
        if isinstance(self.prepare, CachedPrefix):
            return inputs
        cuts = self.prepare is ready or isinstance(self.prepare, TextInputs)
        if cuts and self.engine.device.type != "cpu" and isinstance(inputs, Mapping) and "attention_mask" in inputs:
            # here, as it would wait for the device there; few lengths are few shapes of kernels and of graphs
            inputs = trimmed(dict(inputs), multiple=8)
        return self.engine.place(inputs)


def _outputs(model: Callable[..., Any], inputs: Any) -> Tensor:
    if isinstance(inputs, Resumable):
        out = inputs.resume()
    elif isinstance(inputs, Mapping):
        out = model(**inputs)
    else:
        out = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    # transformers' outputs have logits; torchvision's segmentation models give a dict with "out"
    outputs = getattr(out, "logits", out)
    if isinstance(outputs, Mapping) and "out" in outputs:
        outputs = outputs["out"]
    if isinstance(outputs, tuple) and outputs:
        outputs = outputs[0]
    if not isinstance(outputs, Tensor) or outputs.ndim < 1:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise VisadaptError(f"{type(model).__name__} must give a tensor (N, …), logits or a dict with 'out', got {got}")
    return outputs
