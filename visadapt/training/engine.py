"""Where a step is computed: accelerate's processes and devices, and the model as one of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.checks import check_choice
from visadapt.errors import VisadaptError
from visadapt.frozen.cached_prefix import Resumable
from visadapt.optional import require

PRECISIONS = ("fp32", "bf16")


class Engine:
    """accelerate, with the device and the precision that one training asks for.

    accelerate fixes both for the life of a process, in which trainings may differ.

    Args:
        model: what will be run; moved to the device in place.
        device: None for where the model is, or among several processes for the device that accelerate gives each.
        precision: ``fp32``, or ``bf16`` for autocast with parameters and gradients kept as they are; None for what
            ``accelerate launch`` was told.
        accumulate: parts that each step's batch is computed in; ``accelerate launch`` may say so too.

    Raises:
        VisadaptError: there is no such device here, or no such precision; accelerate is not installed.
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
        accelerate = require("accelerate", "training", "visadapt[train]")
        self.accelerator = accelerate.Accelerator(
            # without it, processes that torchrun started on a machine with CPUs only would not know of each other
            cpu=not torch.accelerator.is_available(),
            device_placement=False,
            gradient_accumulation_steps=accumulate,
            dataloader_config=accelerate.DataLoaderConfiguration(split_batches=True),
        )
        self.rank: int = self.accelerator.process_index
        self.processes: int = self.accelerator.num_processes
        self.parts: int = self.accelerator.gradient_accumulation_steps
        self.device = self._chosen(model, device)
        told = self.accelerator.mixed_precision
        self.precision = precision or ("fp32" if told == "no" else told)
        check_choice(self.precision, PRECISIONS, "precision")
        with _named(self.device):
            model.to(self.device)

    def _chosen(self, model: nn.Module, device: torch.device | str | None) -> torch.device:
        with _named(device):
            chosen = None if device is None else torch.device(device)
        if self.processes == 1:
            first = next((p for p in model.parameters()), torch.empty(0))
            return first.device if chosen is None else chosen
        given: torch.device = self.accelerator.device
        if chosen is not None and chosen.type != given.type:
            raise VisadaptError(
                f"device={str(device)!r} among {self.processes} processes that accelerate runs on {given.type}: leave "
                "it out, or say `accelerate launch --cpu`"
            )
        return given

    @property
    def settings(self) -> dict[str, Any]:
        """What numbers depend on, as JSON values."""
        return {"precision": self.precision, "processes": self.processes, "parts of a batch": self.parts}

    def place(self, batch: Any) -> Any:
        """A batch on the device: tensors, and mappings and sequences of them."""
        return require("accelerate.utils", "training", "visadapt[train]").send_to_device(
            batch, self.device, non_blocking=True
        )

    def gather(self, tensor: Tensor) -> Tensor:
        """The parts of all processes, laid end to end."""
        whole: Tensor = self.accelerator.gather(tensor)
        return whole

    def agree(self, tensors: list[Tensor]) -> None:
        """Gives all processes the first one's values, in place."""
        require("accelerate.utils", "training", "visadapt[train]").broadcast(tensors)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the forward is computed."""
        # switched off as well as on: accelerate may have been told otherwise
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def check_device(device: torch.device | str) -> None:
    """Refuses a device that there is not, or that this process cannot use.

    Raises:
        VisadaptError: it names the device.
    """
    with _named(device):
        torch.empty(1, device=device)


@contextmanager
def _named(device: Any) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise VisadaptError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error


class Performer(nn.Module):
    """A model from the batch as it comes to float32 logits: the module whose gradients the processes share.

    Args:
        model: that performs the task which is chosen around it.
        prepare: makes what the model takes of a batch of inputs on the device.
        engine: where it is computed.
    """

    prepare: Callable[[Any], Any]

    def __init__(self, model: nn.Module, prepare: Callable[[Any], Any], engine: Engine) -> None:
        super().__init__()
        self.model, self.engine = model, engine
        # a transform may be a module, but it is no part of the model
        self.__dict__["prepare"] = prepare

    def forward(self, inputs: Any) -> Tensor:
        """The logits, ``(N, C)``.

        Raises:
            VisadaptError: the model gives something else.
        """
        with self.engine.autocast():
            return _logits(self.model, self.prepare(inputs)).float()


def _logits(model: nn.Module, inputs: Any) -> Tensor:
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
