"""Fast walks over the modules of thousands of tasks.

Each does what a method of ``nn.Module`` or ``copy.deepcopy`` does, without the steps that only modules with hooks or
overrides need. For such a module, torch's own method is called.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from visadapt.backbone.subclass import is_rebuilt_plainly, without
from visadapt.runtime.classes import frozen_class, widened_class


def _inherits(cls: type[nn.Module], *names: str) -> bool:
    return all(getattr(cls, name) is getattr(nn.Module, name) for name in names)


@cache
def _saves_plainly(cls: Any) -> bool:
    return _inherits(cls, "state_dict", "_save_to_state_dict", "get_extra_state")


@cache
def _loads_plainly(cls: Any) -> bool:
    """Whether a module of this class takes its state by ``_parameters`` and ``_buffers`` alone."""
    plain = without(cls, frozen_class, widened_class)
    own = (plain._load_from_state_dict, plain.__setattr__)
    # of an older torch's statistics, it would make up the number of batches
    norms = _NormBase._load_from_state_dict if issubclass(plain, _NormBase) else None
    return (
        _inherits(cls, "load_state_dict", "set_extra_state", "get_extra_state", "state_dict", "_save_to_state_dict")
        and own[0] in (nn.Module._load_from_state_dict, norms)
        and own[1] is nn.Module.__setattr__
    )


@cache
def _moves_plainly(cls: Any) -> bool:
    return _inherits(cls, "_apply")


@cache
def _trains_plainly(cls: Any) -> bool:
    return _inherits(cls, "train")


def set_modes(module: nn.Module, mode: bool) -> None:
    """Put a module and all in it into train or eval mode, as ``module.train(mode)`` does."""
    cls: Any = type(module)
    if not _trains_plainly(cls):
        module.train(mode)
        return
    # also where a frozen class stores it
    module.__dict__["training"] = mode
    for child in module._modules.values():
        if child is not None:
            set_modes(child, mode)


def save_state(module: nn.Module, destination: Any, prefix: str, keep_vars: bool) -> None:
    """Write a module's tensors into a state dict, as ``module.state_dict(destination=…)`` does.

    Args:
        module: the module.
        destination: the state dict.
        prefix: of all names.
        keep_vars: whether parameters are written as they are, and not detached.
    """
    own, cls = module.__dict__, cast("Any", type(module))
    if not _saves_plainly(cls) or own["_state_dict_hooks"] or own["_state_dict_pre_hooks"]:
        module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return
    if hasattr(destination, "_metadata"):
        destination._metadata[prefix[:-1]] = {"version": module._version}
    for name, parameter in own["_parameters"].items():
        if parameter is not None:
            destination[prefix + name] = parameter if keep_vars else parameter.detach()
    for name, buffer in own["_buffers"].items():
        if buffer is not None and name not in own["_non_persistent_buffers_set"]:
            destination[prefix + name] = buffer if keep_vars else buffer.detach()
    for name, child in module._modules.items():
        if child is not None:
            save_state(child, destination, f"{prefix}{name}.", keep_vars)


def load_state(module: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Put tensors in the place of a module's, as ``module.load_state_dict(state, assign=True)`` does.

    Args:
        module: the module.
        state: tensors by name, of which every parameter and persistent buffer of the module has one of its own shape,
            as a parameter or not.
        prefix: of the names.
    """
    own = module.__dict__
    cls: Any = type(module)
    if not _loads_plainly(cls) or own["_load_state_dict_pre_hooks"] or own["_load_state_dict_post_hooks"]:
        names = module.state_dict(keep_vars=True)
        given = OrderedDict((name, state[prefix + name]) for name in names)
        # without the versions of its modules, torch treats a norm with statistics as one of torch 0.4
        given._metadata = names._metadata  # type: ignore[attr-defined]
        module.load_state_dict(given, assign=True)
        return
    for held in (own["_parameters"], own["_buffers"]):
        for name, tensor in held.items():
            if tensor is not None and name not in own["_non_persistent_buffers_set"]:
                # what a method freezes stays frozen
                held[name] = state[prefix + name].requires_grad_(tensor.requires_grad)
    for name, child in own["_modules"].items():
        if child is not None:
            load_state(child, state, f"{prefix}{name}.")


def changes_nothing(module: nn.Module, function: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function returns every tensor of a module as it is, as ``to()`` the same device does.

    Args:
        module: the module.
        function: called on each tensor, up to the first that it changes.
    """
    cls: Any = type(module)
    if not _moves_plainly(cls):
        return False
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            gradient = tensor.grad if tensor.is_leaf else None
            if function(tensor) is not tensor or (gradient is not None and function(gradient) is not gradient):
                return False
    return all(child is None or changes_nothing(child, function) for child in module._modules.values())


_ATOMIC = {int, float, bool, str, type(None), type, complex, bytes, FunctionType, BuiltinFunctionType}
_EMPTY = {dict, OrderedDict, set, list}


def copied(module: nn.Module, memo: dict[int, Any]) -> Any:
    """Copy a module, as ``copy.deepcopy`` does.

    Args:
        module: the module.
        memo: as ``copy.deepcopy`` takes it.
    """
    if id(module) in memo:
        return memo[id(module)]
    cls: Any = type(module)
    if not is_rebuilt_plainly(cls) or "_compiled_call_impl" in module.__dict__:
        return copy.deepcopy(module, memo)
    clone = memo[id(module)] = cls.__new__(cls)
    copied_into(clone, module, memo)
    return clone


def copied_into(clone: nn.Module, module: nn.Module, memo: dict[int, Any]) -> None:
    """Give a new module copies of the attributes of another; see `copied`."""
    own = clone.__dict__
    for name, value in list(module.__dict__.items()):
        kind = type(value)
        # most are numbers, flags and dicts without hooks: a call for each would take half of the time of a copy
        if kind in _ATOMIC:
            own[name] = value
        elif kind in _EMPTY and not value and name != "_buffers":
            # buffers may be another module's, too
            own[name] = kind()
        else:
            own[name] = _copied_value(name, value, memo)


def _copied_value(name: str, value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind is tuple and all(type(each) in _ATOMIC for each in value):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is dict and name == "_modules":
        found = {key: None if child is None else copied(child, memo) for key, child in list(value.items())}
    elif kind is dict and name in ("_parameters", "_buffers"):
        found = {key: copy.deepcopy(tensor, memo) for key, tensor in value.items()}
    else:
        return copy.deepcopy(value, memo)
    memo[id(value)] = found
    return found
