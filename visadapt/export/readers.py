"""Find which modules read which weights: a merge changes a weight for all of them, an adapter acts only at its host."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from visadapt.backbone.modules import joined, own_modules, parent
from visadapt.backbone.trace import call, rehearse


def foreign_reader(model: nn.Module, names: set[str], example: Any = None) -> dict[str, str]:
    """Find the weights that another module than their own computes with.

    Torch's MultiheadAttention does so with its output projection, without calling it. Others are found by a run on
    fake tensors.

    Args:
        model: the backbone.
        names: of the parameters in question.
        example: an input, as `visadapt.sites` takes it; guessed if None.

    Returns:
        Parameter → path of the module that reads it.

    Raises:
        VisadaptError: the model does not run on the input.
    """
    found = {}
    for path, module in own_modules(model).items():
        if isinstance(module, nn.MultiheadAttention):
            inside = {joined(path, f"out_proj.{name}") for name in ("weight", "bias")}
            found.update(dict.fromkeys(inside & names, path))
    if not names:
        return found
    return {**found, **rehearse(model, example, lambda copied, given: _Readers(copied, names).watch(given))[0]}


class _Readers(TorchFunctionMode):
    """Records which modules read the parameters of a temporary copy of a model."""

    def __init__(self, model: nn.Module, names: set[str]) -> None:
        super().__init__()
        self.model = model
        self.found: dict[str, str] = {}
        self._stack: list[str] = []
        self._names: dict[int, set[str]] = {}
        for path, module in own_modules(model).items():
            for name, tensor in module._parameters.items():
                if tensor is not None and joined(path, name) in names:
                    self._names.setdefault(id(tensor), set()).add(joined(path, name))
            module.register_forward_pre_hook(lambda module, args, path=path: self._stack.append(path))
            module.register_forward_hook(lambda module, args, out: self._stack.pop() and None)

    def watch(self, given: Any) -> dict[str, str]:
        """Run the model once."""
        with self:
            call(self.model, given)
        return self.found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":
            # reading a weight's dtype or shape does not compute with it
            here = self._stack[-1] if self._stack else ""
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and id(leaf) in self._names:
                    # a tied weight is read by each of its owners
                    owners = {parent(name) for name in self._names[id(leaf)]}
                    if here not in owners:
                        self.found.update(dict.fromkeys(self._names[id(leaf)], here))
        return func(*args, **kwargs)
