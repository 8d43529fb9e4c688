"""Parameters that the model's own forward writes to, as momentum encoders and renormalised embeddings are."""

from __future__ import annotations

import threading
from operator import attrgetter

import torch
from torch import Tensor, nn

from visadapt.backbone.modules import joined
from visadapt.errors import VisadaptError

_VERSION = attrgetter("_version")


class Written:
    """Compares the frozen parameters of a backbone before and after each forward, by memory and torch's own counts.

    Values are not copied, as that would take as much memory again. What ``.data = …`` replaced is still there and is
    put back; what was changed in place is lost, and refused.
    """

    def __init__(self) -> None:
        self._slots: list[tuple[str, nn.Module, str]] = []
        self._dicts: list[dict[str, nn.Parameter | None]] = []
        self._names: list[str] = []
        self._known: tuple[list[int], list[Tensor]] = ([], [])
        # per thread: the parameters before its forward, their counts and addresses
        self._local = threading.local()

    def look_at(self, modules: dict[str, nn.Module]) -> None:
        """Compare the parameters of these modules, by path, from now on."""
        self._slots = [
            (path, module, name)
            for path, module in modules.items()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._dicts = [module._parameters for _, module, _ in self._slots]
        self._names = [name for _, _, name in self._slots]

    def before(self) -> bool:
        """Note the parameters as they are before a forward.

        Returns:
            Whether all of them are still there.
        """
        self._local.seen = None
        if torch._C._get_tracing_state() is not None:
            # torch.jit.trace would record what is noted as a part of the model
            return True
        # in C, as a model may have hundreds of these
        held = list(map(dict.get, self._dicts, self._names))
        try:
            versions, addresses = list(map(_VERSION, held)), list(map(Tensor.data_ptr, held))  # type: ignore[arg-type]
            if addresses != self._known[0]:
                self._known = addresses, [tensor.detach() for tensor in held if tensor is not None]
        except (AttributeError, TypeError, RuntimeError):
            # removed ones, and those without counts or memory: of inference mode, of torch.func, on fake tensors
            return all(tensor is not None for tensor in held)
        self._local.seen = held, versions, addresses, self._known[1]
        return True

    def after(self) -> VisadaptError | None:
        """Put back what the forward replaced.

        Returns:
            The error for a parameter that it changed in place.
        """
        seen = getattr(self._local, "seen", None)
        if seen is None:
            return None
        held, versions, addresses, memory = seen
        if list(map(_VERSION, held)) == versions and list(map(Tensor.data_ptr, held)) == addresses:
            return None
        for (path, _, name), tensor, version, address, old in zip(
            self._slots, held, versions, addresses, memory, strict=True
        ):
            if tensor.requires_grad:
                # the user's to train
                continue
            if tensor._version != version:
                return VisadaptError(
                    f"the forward wrote to the parameter {joined(path, name)}, which is frozen and shared by all "
                    "tasks: move it outside of the forward, or make it a buffer, which is put back after each forward"
                )
            if tensor.data_ptr() != address and tensor.shape == old.shape and tensor.dtype == old.dtype:
                tensor.data = old
        return None
