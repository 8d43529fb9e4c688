"""Fingerprints of backbones: digests of names, shapes and weights, recorded in task files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from visadapt.backbone.compact import Compact
from visadapt.backbone.modules import CHILD
from visadapt.backbone.stored_values import packed_tensors, plain_tensors
from visadapt.tensor_file import raw


def backbone_tensors(model: nn.Module, packed: bool = False) -> dict[str, Tensor]:
    """Return the backbone's parameters and persistent buffers by name, without those of tasks.

    ``num_batches_tracked`` is left out: it counts training steps and does not affect outputs.

    Args:
        model: the backbone.
        packed: whether to add the weights that quantised layers of torch.ao hold in objects of their own.
    """
    found: dict[str, Tensor] = {}

    def visit(module: nn.Module, path: str) -> None:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set and name != "num_batches_tracked":
                found[path + name] = tensor
        if packed:
            found.update({path + name: tensor for name, tensor in packed_tensors(module).items()})
        for name, child in module._modules.items():
            if child is not None and name != CHILD:
                visit(child, f"{path}{name}.")

    visit(model, "")
    return found


def is_on_meta(model: nn.Module) -> bool:
    """Whether any tensor of the backbone is on the meta device, and so has no values."""
    return any(tensor.is_meta for tensor in backbone_tensors(model).values())


@lru_cache(4096)
def group_of(name: str) -> str:
    """Return the block of a tensor: its path up to the last number, or else its module (``layer1.0``, ``conv1``)."""
    path = name.split(".")[:-1]
    numbers = [i for i, word in enumerate(path) if word.isdigit()]
    return ".".join(path[: numbers[-1] + 1] if numbers else path)


Digests = dict[str, tuple[Any, bytes]]
"""Tensor name → cheap description of the tensor when it was hashed, and its digest."""


def fingerprint(
    model: nn.Module, without: Iterable[str] = (), known: Digests | None = None, packed: bool = True
) -> dict[str, list[str]]:
    """Compute digests of a backbone per block (0.1 s for a ResNet-50, a few ms if most tensors are known).

    Args:
        model: the backbone.
        without: modules to leave out, such as a head that the task replaces.
        known: digests of earlier calls, updated by this one. A tensor is hashed again if its memory, its version
            counter or a sample of its values changed.
        packed: whether packed weights of quantised layers are covered; files of earlier versions leave them out.

    Returns:
        Block → [digest of names and shapes, digest of the values].

    Raises:
        VisadaptError: the values of a tensor cannot be read.
    """
    return fingerprint_of(backbone_tensors(model, packed), without, known)


def fingerprint_of(
    tensors: Mapping[str, Tensor], without: Iterable[str] = (), known: Digests | None = None
) -> dict[str, list[str]]:
    """Compute the `fingerprint` of a backbone whose `backbone_tensors` are at hand.

    Args:
        tensors: of the backbone, by name.
        without: as in `fingerprint`.
        known: as in `fingerprint`.
    """
    known = {} if known is None else known
    left_out = tuple(f"{path}." for path in without)
    shapes: dict[str, hashlib._Hash] = {}
    values: dict[str, hashlib._Hash] = {}
    for name, tensor in tensors.items():
        if name.startswith(left_out):
            continue
        group = group_of(name)
        shapes.setdefault(group, hashlib.sha256()).update(f"{name}{tuple(tensor.shape)}".encode())
        values.setdefault(group, hashlib.sha256()).update(_digest(tensor, name, known))
    return {group: [shapes[group].hexdigest()[:8], values[group].hexdigest()[:16]] for group in shapes}


def _digest(tensor: Tensor, name: str, known: Digests) -> bytes:
    if isinstance(tensor, Compact):
        # of the weight that it stands for
        return tensor.stored.digest
    plain = plain_tensors(tensor, name)
    look = [_look(each) for each in plain]
    if name not in known or known[name][0] != look:
        digest = hashlib.sha256()
        for each in plain:
            digest.update(raw(each))
        known[name] = (look, digest.digest())
    return known[name][1]


def _look(tensor: Tensor) -> tuple[Any, ...]:
    # writes through .data do not change the version counter, so a few values are compared too
    count = tensor.numel()
    step = max(1, count // 8)
    if tensor.is_contiguous():
        sample = tensor.as_strided((-(-count // step),), (step,)).tolist()
    else:
        sample = tensor.detach().reshape(-1)[::step].tolist()
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.dtype, sample


def differences(expected: dict[str, list[str]], found: dict[str, list[str]], values: bool) -> str:
    """Describe what differs between two backbones in words; empty if nothing does.

    Args:
        expected: fingerprint of the backbone that the file was trained on.
        found: fingerprint of the backbone at hand.
        values: whether to compare the weights as well as names and shapes.
    """
    missing = [group for group in expected if group not in found]
    extra = [group for group in found if group not in expected]
    both = [group for group in expected if group in found]
    shapes = [group for group in both if expected[group][0] != found[group][0]]
    weights = [group for group in both if group not in shapes and expected[group][1] != found[group][1]]
    words = [
        f"{what} {_few(groups)}"
        for what, groups in (
            ("it lacks", missing),
            ("it has beyond it", extra),
            ("other names or shapes in", shapes),
            ("other weights in", weights if values else []),
        )
        if groups
    ]
    return "; ".join(words)


def _few(groups: list[str]) -> str:
    shown = ", ".join(groups[:4])
    return shown if len(groups) <= 4 else f"{shown} and {len(groups) - 4} more blocks"
