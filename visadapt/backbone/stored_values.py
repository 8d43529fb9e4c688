"""Plain tensors behind quantised ones: what a fingerprint can read bytes of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from visadapt.errors import VisadaptError


def plain_tensors(tensor: Tensor, name: str) -> list[Tensor]:
    """Return the plain, dense tensors that hold a tensor's values.

    Args:
        tensor: a plain tensor; a quantised, sparse or sharded one; or a subclass that keeps its values in other
            tensors, as torchao's do.
        name: where the tensor is, for the error.

    Returns:
        The tensor itself if it is plain; otherwise codes, scales and zero points, or indices and values.

    Raises:
        VisadaptError: the tensor's class does not tell where its values are.
    """
    if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized:
        return [tensor]
    if hasattr(tensor, "full_tensor"):
        # sharded by torch.distributed: every process takes part
        return plain_tensors(tensor.full_tensor(), name)
    inner = _inner_tensors(tensor)
    if inner:
        return [plain for each in inner for plain in plain_tensors(each, name)]
    if tensor.is_quantized:
        return _quantised(tensor)
    if tensor.layout is not torch.strided:
        return [tensor.detach().to_dense()]
    if _is_opaque(tensor):
        raise VisadaptError(
            f"{name} is a {type(tensor).__name__}, whose values cannot be read: such a class needs __tensor_flatten__"
        )
    return [tensor]


def is_stored_otherwise(tensor: Tensor) -> bool:
    """Return whether a subclass of tensor keeps its values in other tensors of this process, as torchao's do."""
    return not hasattr(tensor, "full_tensor") and (bool(_inner_tensors(tensor)) or _is_opaque(tensor))


def packed_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in a module's attributes that TorchScript objects hold, as torch.ao's quantised layers do.

    Args:
        module: the module, without its children.

    Returns:
        Tensors by attribute and position (``_packed_params.0``); empty for ordinary modules.
    """
    found: dict[str, Tensor] = {}
    for name, value in module.__dict__.items():
        if isinstance(value, torch.ScriptObject):
            found |= {f"{name}.{i}": tensor for i, tensor in enumerate(_tensors_in(value))}
    return found


def _tensors_in(packed: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for leaf in tree_leaves(packed.__getstate__()):
        if isinstance(leaf, torch.ScriptObject):
            found += _tensors_in(leaf)
        elif isinstance(leaf, Tensor):
            found.append(leaf)
    return found


def _inner_tensors(tensor: Tensor) -> list[Tensor]:
    if hasattr(type(tensor), "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return [getattr(tensor, name) for name in names]
    if not _dispatches(tensor):
        return []
    return [value for _, value in sorted(vars(tensor).items()) if isinstance(value, Tensor)]


def _dispatches(tensor: Tensor) -> bool:
    own: Any = type(tensor).__torch_dispatch__
    return own is not Tensor.__torch_dispatch__ and type(tensor) is not nn.Parameter


def _is_opaque(tensor: Tensor) -> bool:
    """Whether a subclass of tensor has no memory of its own."""
    if not _dispatches(tensor) or not tensor.numel():
        return False
    try:
        return tensor.untyped_storage().data_ptr() == 0
    except RuntimeError:
        return True


def _quantised(tensor: Tensor) -> list[Tensor]:
    codes = tensor.detach().int_repr()
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale = torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)
        return [codes, scale]
    return [codes, tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
